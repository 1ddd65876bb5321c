"""What users write becomes a configuration: files, command lines, values, and the checks of a whole configuration."""

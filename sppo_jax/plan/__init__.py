"""Plans: memory, time and cost of each stage of a run, on devices that are not here."""

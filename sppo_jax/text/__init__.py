"""Text in, ids out: rows of data sets, and the one place where text becomes ids."""

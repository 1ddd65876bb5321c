"""The update: batches, the jitted regression, the optimiser, checkpoints and memory."""

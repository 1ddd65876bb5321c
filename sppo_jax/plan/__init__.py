"""What a run would take on devices that are not here: memory, time and cost of each stage."""

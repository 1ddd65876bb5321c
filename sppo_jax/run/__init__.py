"""What a run leaves on disk: where each file lies, what it was made from, its shards, metrics and manifest."""

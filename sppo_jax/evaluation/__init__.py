"""Policies measured outside of a run: answers, win rates, games between them, and the public benchmarks' files."""

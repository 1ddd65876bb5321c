"""Hugging Face names and repositories: a name becomes a directory of one pinned commit, an export a repository."""

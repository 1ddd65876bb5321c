"""The embedded default: a small world of prompts with a policy and a preference model, so that everything runs anywhere.

build.py makes the files under data/; see data/README.md. Runs find them by name (`sppo_jax.hub.names`).
"""

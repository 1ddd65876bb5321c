"""The embedded default: a small world, a policy and a preference model for it, so that everything runs anywhere.

The files under data/ were made by build.py; see data/README.md. Runs find them by name (`sppo_jax.hub.names`).
"""

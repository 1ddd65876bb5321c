PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: quickstart test lint venv tiny config-docs

quickstart: venv
	$(RUN) -m sppo_jax.main --config configs/quickstart.yaml

test: venv
	$(RUN) -m pytest -n auto --dist loadfile

lint: venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

tiny: venv
	$(RUN) -m sppo_jax.tiny.build

config-docs: venv
	$(RUN) -m sppo_jax.config > configs/README.md

venv: .venv/installed

# The stamp is the last thing written: an interrupted installation starts again.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

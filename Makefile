PYTHON ?= python3
RUN := .venv/bin/python

# Tests start hundreds of processes, each of which would compile all that it imports again: five seconds of jax and torch.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-long lint venv dev tiny config-docs files-docs plan

quickstart: venv
	$(RUN) -m sppo_jax.main --config configs/quickstart.yaml

TESTS := $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: dev
	$(TESTS) -m "not long"

test-long: dev
	$(TESTS) -m long

lint: dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy --num-workers auto
	.venv/bin/lint-imports

tiny: venv
	$(RUN) -m sppo_jax.tiny.build

# The TPU's compiler lies beside the environment: inside, it would make every start of jax look for a TPU.
plan: venv .tpu/installed
	PYTHONPATH=.tpu $(RUN) -m sppo_jax.plan --write --config configs/mistral_7b.yaml --topology v5e:4x4 --topology v5e:8x8 --topology v6e:2x4
	PYTHONPATH=.tpu $(RUN) -m sppo_jax.plan --write --config configs/llama3_8b.yaml --topology v5e:4x4
	PYTHONPATH=.tpu $(RUN) -m sppo_jax.plan --write --config configs/gemma2_9b.yaml --topology v5e:4x4

.tpu/installed: venv
	$(PIP) --no-deps --target .tpu libtpu==0.0.42.1
	touch $@

config-docs: venv
	$(RUN) -m sppo_jax.config > configs/README.md

files-docs: venv
	$(RUN) -m sppo_jax.run.layout > docs/files.md

venv: .venv/installed

dev: .venv/installed-dev

# A stamp is the last thing written: an interrupted installation starts again. Python compiles what is imported when it is
# imported, which takes less time than compiling everything now.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

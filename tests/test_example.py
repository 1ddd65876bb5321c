"""The example that shows the whole algorithm, and the public names that it uses."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

import sppo_jax
from sppo_jax import models

EXAMPLE = Path(__file__).parent.parent / "examples" / "sppo_in_100_lines.py"


def test_the_example_learns_and_writes_a_policy_that_loads(tmp_path, policy):
    words = ["--to", tmp_path / "out", "--iterations", "1", "--per-iteration", "12", "--epochs", "6"]
    run = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run.stdout)]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    trained = models.load(tmp_path / "out")
    assert trained.architecture == policy.architecture
    assert not jnp.array_equal(trained.embedding[...], policy.embedding[...])


def test_importing_the_package_does_not_import_jax():
    code = "import sys, sppo_jax; print(sppo_jax.__version__, 'jax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [sppo_jax.__version__, "False"]


def test_public_names_are_those_of_their_modules():
    for name in (*sppo_jax.MODULES, *sppo_jax.NAMES):
        assert name in dir(sppo_jax)
        assert getattr(sppo_jax, name).__name__.rsplit(".")[-1] == name
    assert sppo_jax.Sampler is sppo_jax.sampler.Sampler
    assert not hasattr(sppo_jax, "nothing")

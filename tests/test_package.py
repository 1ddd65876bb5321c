"""The archives that `python -m build` makes: whole, and of use where they are installed, from any directory."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import sppo_jax
from sppo_jax.errors import BadInput
from sppo_jax.text import rows
from sppo_jax.text.source import Source

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def call(*words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive as `python -m build` does."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "sppo_jax"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    code, said = call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert code == 0, said
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel, that sees the other packages of this one."""
    root = tmp_path_factory.mktemp("fresh")
    venv.create(root, with_pip=False)
    (site,) = root.glob("lib/python3*/site-packages")
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "shared.pth").write_text("\n".join(shared))
    python = root / "bin/python"
    flags = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    code, said = call(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel)
    assert code == 0, said
    return root / "bin"


def test_the_wheel_has_every_file_of_the_package_and_the_shipped_configurations(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = (path for path in (ROOT / "sppo_jax").rglob("*") if path.is_file())
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    expected |= {f"sppo_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert expected <= names, expected - names
    assert {name.split("/")[0] for name in names} == {"sppo_jax", wheel.name.rsplit("-", 3)[0] + ".dist-info"}


def test_an_installed_package_finds_its_configurations_from_any_directory(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": environment}
    code, said = call(installed / "python", "-c", "import sppo_jax; print(sppo_jax.__file__)", **where)
    assert said.startswith(str(installed.parent)), said
    code, said = call(installed / "sppo_jax", "--version", **where)
    assert code == 0, said
    assert sppo_jax.__version__ in said
    # The file is found, and read: its knob and the flag's contradict each other.
    code, said = call(installed / "sppo_jax", "train", "--config", "quickstart", "--fit.eta", "-1", **where)
    assert code == 2
    assert "fit.eta" in said
    code, said = call(installed / "sppo_jax", "train", "--config", "quickstrat", **where)
    assert code == 2
    assert "did you mean quickstart?" in said
    assert not list(tmp_path.iterdir())


def test_python_versions_are_stated_in_step():
    stated = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert PROJECT["requires-python"] == f">={stated[0]}"
    assert f"Python {stated[0]} to {stated[-1]}" in (ROOT / "README.md").read_text()


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'sppo_jax\[tfds\]'"):
        list(rows.rows(Source("prompts.source", "tfds:mnist", "train"), ["prompt"]))

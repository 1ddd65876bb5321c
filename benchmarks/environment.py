"""Environments of other packages, each made once from a requirements file, for the benchmarks that compare with them."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sppo_jax"


def interpreter(name: str, requirements: Path, cache: Path, *, whole: bool = False) -> Path:
    """Return the interpreter of an environment, which is made unless it exists with these requirements.

    `whole`: the file names every package that is needed, and no other is installed.
    """
    home = cache / name
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        print(f"making the environment of {name} in {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        options = ["--no-deps"] if whole else []
        subprocess.run([python, "-m", "pip", "install", "-q", *options, "-r", requirements], check=True)
        shutil.copy(requirements, stamp)
    return python


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --cache, the directory in which environments lie."""
    parser.add_argument("--cache", type=Path, default=DEFAULT, help="where other packages' environments lie")

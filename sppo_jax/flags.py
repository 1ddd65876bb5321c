"""Flags of the small commands: argparse whose complaint is one line and exit code 2, like all bad input."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from sppo_jax.errors import BadInput


class Flags(argparse.ArgumentParser):
    """`command` is the module that `python -m` runs; no flag may be shortened, so that new ones break nobody."""

    def __init__(self, command: str, about: str, more: str = ""):
        super().__init__(
            prog=f"python -m {command}",
            description=about,
            epilog=more,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        return self.parse_args(list(words))

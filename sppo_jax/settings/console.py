"""The console script: which command its first word names, and what it lists."""

import difflib
import runpy
import sys

from sppo_jax import command
from sppo_jax.errors import end_on_ctrl_c


def script() -> None:
    """The console script: `sppo_jax NAME WORDS` does what `python -m sppo_jax.NAME WORDS` does; train stands for main."""
    end_on_ctrl_c()
    command.open_streams()
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(_commands(), file=command.shown(sys.stdout), flush=True)
        return
    if "--version" in (name, *words):
        print(command.version(), file=command.shown(sys.stdout), flush=True)
        return
    module = "main" if name == command.TRAIN else name
    if module not in command.COMMANDS:
        command.say(f"error: {_not_a_command(command.printable(name))}")
        sys.exit(command.BAD_INPUT)
    sys.argv = [f"sppo_jax {name}", *words]
    if not sys.flags.safe_path:
        sys.path[0] = ""  # as by python -m: a judge in the working directory is found
    runpy.run_module(f"sppo_jax.{module}", run_name="__main__", alter_sys=True)


def _names() -> dict[str, str]:
    """The script's commands, {name: what it does}: main is called train, and still found by its own name."""
    return {command.TRAIN if name == "main" else name: about for name, about in command.COMMANDS.items()}


def _commands() -> str:
    """The text of `sppo_jax --help`."""
    return "\n".join(
        [
            "sppo_jax COMMAND [FLAGS]",
            "",
            "  sppo_jax train --config quickstart --out runs/quickstart",
            "",
            *(f"  {name:<12} {about}" for name, about in _names().items()),
            "",
            "sppo_jax COMMAND --help lists the flags of one; sppo_jax --version prints the version.",
        ]
    )


def _not_a_command(name: str) -> str:
    """The line about a first word of the console script that names no command."""
    names = list(_names())
    if name.startswith("-"):
        return f"{name} comes after a command, as sppo_jax train {name}; commands are {', '.join(names)}"
    near = difflib.get_close_matches(name, names, n=1)
    return (
        f"{name} is not a command; "
        + (f"did you mean sppo_jax {near[0]}? " if near else "")
        + f"commands are {', '.join(names)}"
    )

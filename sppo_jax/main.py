"""The command line: `python -m sppo_jax.main --config FILE [--section.key value ...]` plays the whole game."""

from collections.abc import Sequence

from sppo_jax import config_file
from sppo_jax.command import call
from sppo_jax.config import knobs
from sppo_jax.errors import BadInput


def main(words: Sequence[str]) -> None:
    """Play the game that the command line describes. Raises BadInput for a command line that cannot be used."""
    if "--help" in words or "-h" in words:
        print(usage())
        return
    files, overrides = _split(words)
    config = config_file.load(files, overrides)
    # Only now, since these import jax: a wrong flag is refused at once.
    from sppo_jax import compilation, selfplay, session

    compilation.keep_programs()
    with session.opened(config) as opened:
        selfplay.play(opened)


def usage() -> str:
    """The text of --help: every knob with its type, range, default and meaning."""
    lines = [
        "python -m sppo_jax.main --config FILE [--config FILE ...] [--section.key value ...]",
        "",
        "Plays SPPO with this configuration; the same command again resumes. Later files override earlier ones, and",
        "flags override all files.",
        "",
    ]
    for key, kind, default, text, accepted in knobs():
        limits = f", {accepted}" if accepted else ""
        lines += [f"  --{key} {kind}{limits}", f"      {text} (default: {default!r})"]
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of the --config flags, and all other words."""
    files, rest, todo = [], [], list(words)
    while todo:
        word = todo.pop(0)
        if word == "--config":
            if not todo:
                raise BadInput("--config needs a file")
            files.append(todo.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return files, rest


if __name__ == "__main__":
    call(main)

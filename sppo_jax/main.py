"""The command line: `python -m sppo_jax.main --config FILE [--section.key value ...]` plays the whole game."""

from collections.abc import Sequence

from sppo_jax import config as configuration
from sppo_jax.command import call
from sppo_jax.errors import BadInput


def main(words: Sequence[str]) -> None:
    """Play the game that the words describe; raises BadInput for what is wrong with them."""
    if "--help" in words or "-h" in words:
        print(usage())
        return
    files, overrides = _split(words)
    config = configuration.load(files, overrides)
    from sppo_jax import (
        compilation,
        selfplay,
        session,
    )  # after the flags are known to be right: this imports jax

    compilation.keep_programs()
    with session.opened(config) as opened:
        selfplay.play(opened)


def usage() -> str:
    """Every knob with its type, default and meaning."""
    lines = [
        "python -m sppo_jax.main --config FILE [--config FILE ...] [--section.key value ...]",
        "",
        "Plays SPPO as the configuration says; run it again and it resumes. Later files and flags override.",
        "",
    ]
    for key, kind, default, text in configuration.knobs():
        lines += [f"  --{key} {kind}", f"      {text} (default: {default!r})"]
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(--config files, everything else)."""
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

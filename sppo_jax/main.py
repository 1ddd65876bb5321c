"""The command line: `python -m sppo_jax.main --config FILE [--section.key value ...]` plays the whole game."""

from collections.abc import Sequence

from sppo_jax import config_file
from sppo_jax.command import call
from sppo_jax.config import Config, knobs
from sppo_jax.settings import words as command_line


def main(words: Sequence[str]) -> None:
    """Play the game that the command line describes. Raises BadInput for a command line that cannot be used."""
    if "--help" in words or "-h" in words:
        print(usage())
        return
    files, overrides = command_line.split(words, {"--config": True})
    play(config_file.load([file for _, file in files], overrides))


def play(config: Config) -> None:
    """Play the game of this configuration: its inputs are opened, and all its iterations are played or found on disk."""
    # Only now, since these import jax: a wrong flag is refused at once.
    from sppo_jax import compilation, selfplay, session
    from sppo_jax.run import bucket, cluster, pod

    compilation.keep_programs()
    with cluster.joined(config.distributed):
        with bucket.opened(config.out, pod.index(), pod.count()), session.opened(config) as opened:
            selfplay.play(opened)
        pod.meet("end")  # a failure of any process until here is the run's


def usage() -> str:
    """The text of --help: every knob with its type, range, default and meaning."""
    lines = [
        "python -m sppo_jax.main --config FILE [--config FILE ...] [--section.key value ...]",
        "",
        "Plays SPPO with this configuration; the same command again resumes. Later files override earlier ones, and",
        "flags override all files; of a flag given twice the last counts. A value that begins with -- is written",
        "--section.key=--value.",
        "",
    ]
    for key, kind, default, text, accepted in knobs():
        limits = f", {accepted}" if accepted else ""
        lines += [f"  --{key} {kind}{limits}", f"      {text} (default: {default!r})"]
    return "\n".join(lines)


if __name__ == "__main__":
    call(main)

"""The command: `python -m sppo_jax.report --run OUT` writes OUT/report.html again from what is on disk."""

import os
from collections.abc import Sequence

from sppo_jax import files
from sppo_jax.command import Flags, call
from sppo_jax.errors import BadInput


def main(words: Sequence[str]) -> None:
    """Write the report of `--run OUT` again. Raises BadInput for other flags, or where OUT is not a run directory."""
    flags = Flags("sppo_jax.report", "Write OUT/report.html again from what is on disk.")
    flags.add_argument("--run", required=True, action="append", metavar="OUT", help="run directory")
    given = flags.read(words).run
    # Only now, since the page imports pyarrow and matplotlib: a wrong flag is refused at once.
    from sppo_jax.report import page
    from sppo_jax.run import bucket
    from sppo_jax.run.directory import RunDir

    if len(given) > 1:
        raise BadInput("--run is given twice; give one run directory")
    with bucket.reading(given[0], bucket.without_weights):
        run = RunDir(files.expand(given[0]))
        if not files.is_dir(run.root):
            what = "not a directory" if files.exists(run.root) else "no such directory"
            raise BadInput(f"--run {given[0]}: {what}; give the directory that --out named")
        if not os.path.lexists(run.config):  # one that cannot be read is noted on the page
            raise BadInput(f"--run {given[0]}: not a run directory (it has no config.yaml)")
        page.write(run)
        print(bucket.shown(run.report))


if __name__ == "__main__":
    call(main, resumes=False)

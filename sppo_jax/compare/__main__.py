"""The command: `python -m sppo_jax.compare` plays configurations with several seeds, and writes one report of them."""

from collections.abc import Sequence

from sppo_jax.command import call
from sppo_jax.compare import flags

USAGE = """python -m sppo_jax.compare --configs A B ... [--seeds 0 1 2] [--out DIR] [--section.key value ...]

Plays each configuration with each seed, one run after another, and writes one report: the means over the seeds with
their intervals. The same command again resumes, or prints the table of a finished comparison.

  python -m sppo_jax.compare --config quickstart --configs sppo= dpo=iterative_dpo ipo=iterative_ipo --out runs/losses
  python -m sppo_jax.compare --config quickstart --grid fit.learning_rate=5e-5,1e-4,2e-4 --out runs/rates

What is compared

  --configs A B ...      the variants, each as [NAME=][FILE[+FILE ...]][,section.key=value ...]: files or names of
                         shipped configurations, later ones over earlier ones, then knobs over all of them. NAME= alone
                         is the common configuration as it is. Without NAME= a variant is called what it is made of
  --grid key=V1,V2 ...   each variant with each of these values; several keys give all combinations
  --seeds S1 S2 ...      the seeds of each variant (default: 0 1 2)

What is common

  --config FILE          a configuration below all variants; several, as in python -m sppo_jax.main
  --section.key value    any knob, over the files of all variants; a variant's own knob wins

What comes out

  --out DIR              where it lies (default: runs/compare): ordinary runs in DIR/VARIANT/seed-S, the report in
                         DIR/report.html, and all its numbers in DIR/results.json
  --iteration T          the iteration whose figures are in the table (default: the last one of each variant)
  --quiet                print nothing but warnings, errors, tables and paths
  --version              print the version
  --help                 print this text

docs/compare.md explains the figures. Knobs are listed by python -m sppo_jax.main --help."""


def main(words: Sequence[str]) -> None:
    """Play and report the comparison that the command line describes. Raises BadInput for one that cannot be used."""
    if "--help" in words or "-h" in words:
        print(USAGE)
        return
    asked = flags.read(words)
    # Only now, since it imports jax: a mistake in any variant is refused at once.
    from sppo_jax.compare import playing

    playing.play(asked)


if __name__ == "__main__":
    call(main)

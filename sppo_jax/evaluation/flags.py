"""What `python -m sppo_jax.evaluate` is asked for: its own flags, and the knobs of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sppo_jax import command, config_file, files
from sppo_jax.config import EMBEDDED, Config, Prompts
from sppo_jax.errors import BadInput
from sppo_jax.settings import words as command_line
from sppo_jax.settings import yaml_text

LISTS = {"--round-robin": "two or more policies", "--write": "a format and a file"}
SINGLE = (
    "--policy",
    "--against",
    "--best-of",
    "--prompts",
    "--out",
    "--preset",
    "--arena-format",
    "--config",
)
ARENA_FORMATS = ("current", "2024")
MOST = 1024  # responses of a best-of
RUN = "config.yaml"  # the file that makes a directory a run's

USAGE = """python -m sppo_jax.evaluate --policy A --against B [--prompts SOURCE] [--section.key value ...]
python -m sppo_jax.evaluate --round-robin A B C ...
python -m sppo_jax.evaluate --policy A --best-of 16 [--against B]
python -m sppo_jax.evaluate --policy A --prompts SOURCE --write FORMAT FILE [--preset NAME]

Compares policies on prompts, by a judge, and writes the public benchmarks' files. The same command again resumes.

  python -m sppo_jax.evaluate --policy runs/quickstart@3 --against runs/quickstart@0

A policy is an iteration of a run (OUT@3; OUT@0: its base), a Hugging Face directory, a name on the hub, or embedded:policy.

  --policy A             the policy that is measured
  --against B            its opponent: win rate with interval, ties, lengths, length-controlled rate, repetition
  --round-robin A B ...  all pairs of these, whether they beat each other in a ring, and their best mixture
  --best-of N            the best of N responses by the judge, against one response (of B, or of A itself)
  --prompts SOURCE       jsonl:PATH, parquet:PATH, hf:NAME or tfds:NAME (default: the held-out prompts of the run, or
                         of the configuration); also the public benchmarks' own files
  --write FORMAT FILE    write A's responses: alpaca_eval, mt_bench, arena_hard or jsonl
  --preset NAME          sampling as the paper has it: paper-mistral, paper-llama3 or paper-gemma2
  --arena-format FORMAT  of arena_hard: current, or 2024 as in the paper's time (default: current)
  --out DIR              where responses and comparisons are kept and found again (default: evaluations)
  --config FILE          a configuration; where a policy is a run's, the run's own comes before it
  --section.key value    any knob: judge.path, judge.backend, eval.oracle, eval.prompts, sampling.temperature, seed ...

docs/evaluation.md explains every figure and format. Knobs are listed by python -m sppo_jax.main --help."""


@dataclass(frozen=True)
class Asked:
    """A command line of `evaluate`, checked as far as no model is needed."""

    policies: list[str]  # --policy and --against, or those of --round-robin
    config: Config
    out: Path
    round_robin: bool = False
    best_of: int = 0
    prompts: str = ""
    write: tuple[str, str] | None = None  # format and file
    preset: str = ""
    arena_format: str = "current"
    named: frozenset[str] = field(default_factory=frozenset)  # knobs that the command line names


def read(words: Sequence[str]) -> Asked:
    """Parse a command line. Raises BadInput for one that cannot be used, before anything is loaded."""
    lists, rest = _lists(words)
    own, overrides = command_line.split(rest, dict.fromkeys(SINGLE, True))
    given = {flag: value for flag, value in own if flag != "--config"}
    if counts := [flag for flag in given if [f for f, _ in own].count(flag) > 1]:
        raise BadInput(f"{counts[0]} is given twice")
    policies = _policies(given, lists)
    prompts = given.get("--prompts", "")
    judged = "--write" not in lists or bool({"--against", "--best-of"} & given.keys())
    config = _config(policies[0], [v for flag, v in own if flag == "--config"], overrides, prompts, judged)
    out = given.get("--out", "evaluations")
    if "://" in out:
        raise BadInput(f"--out {out}: evaluations lie in a directory of this machine; name one")
    arena = given.get("--arena-format", "current")
    if arena not in ARENA_FORMATS:
        raise BadInput(f"--arena-format {arena}: must be one of {', '.join(ARENA_FORMATS)}")
    write = lists.get("--write")
    return Asked(
        policies,
        config,
        Path(files.expand(out)),
        round_robin="--round-robin" in lists,
        best_of=_number("--best-of", given["--best-of"]) if "--best-of" in given else 0,
        prompts=prompts,
        write=(write[0], write[1]) if write else None,
        preset=given.get("--preset", ""),
        arena_format=arena,
        named=frozenset(word.partition("=")[0].removeprefix("--") for word in overrides),
    )


def _lists(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take out the flags that have several values, up to the next flag each."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word not in LISTS:
            rest.append(word)
            continue
        if word in found:
            raise BadInput(f"{word} is given twice")
        found[word] = []
        while at < len(words) and not words[at].startswith("--"):
            found[word].append(words[at])
            at += 1
        if len(found[word]) < 2 or (word == "--write" and len(found[word]) != 2):
            raise BadInput(f"{word} needs {LISTS[word]}, found {' '.join(found[word]) or 'nothing'}")
    return found, rest


def _policies(given: dict[str, str], lists: dict[str, list[str]]) -> list[str]:
    """The names of the policies. Raises BadInput for flags that contradict each other, or ask for nothing."""
    if "--round-robin" in lists:
        for flag in ("--policy", "--against", "--best-of", "--write"):
            if flag in given or flag in lists:
                raise BadInput(f"{flag} and --round-robin are different questions: give one of them")
        names = lists["--round-robin"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"--round-robin names {twice[0]} twice")
        return names
    if "--policy" not in given:
        raise BadInput(
            "nothing to evaluate: give --policy A --against B, or --round-robin A B ...; see --help"
        )
    if not {"--against", "--best-of", "--write"} & (given.keys() | lists.keys()):
        raise BadInput("--policy alone asks nothing: add --against B, --best-of 16, or --write FORMAT FILE")
    if "--arena-format" in given and lists.get("--write", [""])[0] != "arena_hard":
        raise BadInput("--arena-format is for --write arena_hard FILE")
    if "--best-of" in given and lists.get("--write", [""])[0] == "mt_bench":
        raise BadInput("--write mt_bench draws one response to each turn: leave --best-of out")
    return [given[flag] for flag in ("--policy", "--against") if flag in given]


def _config(policy: str, config_files: list[str], overrides: list[str], prompts: str, judged: bool) -> Config:
    """The configuration: the run's own, where the first policy is of a run, then files, then flags."""
    run = run_of(policy)
    first: list[str] = []
    if run is not None:
        if not _names_mesh(
            config_files
        ):  # these devices, which are perhaps not the ones that the run was trained on
            first += ["--mesh.data=1", "--mesh.fsdp=-1", "--mesh.tensor=1"]
        config_files = [str(Path(run[0]) / RUN), *config_files]
    else:
        _check_run(policy)
        named = (word.partition("=")[0].startswith("--prompts.") for word in overrides)
        if not (prompts or config_files or policy.startswith(EMBEDDED) or any(named)):
            raise BadInput(
                f"{policy} is of no run, which would have prompts: give --prompts jsonl:PATH, parquet:PATH, hf:NAME or "
                "tfds:NAME"
            )
        first.append(f"--model.path={policy}")
        if not judged:  # beside a policy of the user's own a judge must be named, also where none is opened
            first.append("--judge.path=none")
    if prompts:  # in both knobs, which must be named beside a policy of the user's own
        first += [f"--prompts.source={prompts}", f"--prompts.heldout={prompts}"]
        # A run's own, which are not of these prompts.
        first += [
            "--pairs.source=",
            "--responses.source=",
            f"--prompts.heldout_split={Prompts.heldout_split}",
        ]
    return config_file.load(config_files, [*first, *overrides])


def _names_mesh(config_files: list[str]) -> bool:
    keys = (key for file in config_files for key in yaml_text.read(config_file.find(file)))
    return any(key.startswith("mesh.") for key in keys)


def run_of(policy: str) -> tuple[str, int] | None:
    """The run directory and the iteration that OUT@T names; None for any other name of a policy.

    Raises BadInput for a directory before the @ that is no run.
    """
    out, at, number = policy.rpartition("@")
    if policy.startswith(EMBEDDED) or not at or not _is_number(number):
        return None
    if "://" in out:
        raise BadInput(
            f"{policy}: runs in buckets are not read here; python -m sppo_jax.export --run {out} --iteration {number} --to DIR "
            "makes a directory of its policy"
        )
    root = files.expand(out)
    if files.is_file(Path(root) / RUN):
        return root, int(number)
    if files.exists(Path(root)):
        raise BadInput(f"{policy}: {out} is not a run directory (it has no config.yaml)")
    if out.count("/") == 1 and not out.startswith((".", "/", "~")):  # perhaps owner/repo@revision of the hub
        return None
    raise BadInput(f"{policy}: no such directory {out}")


def _check_run(policy: str) -> None:
    """Raise BadInput, with the name to give, for a run directory without an iteration."""
    root = Path(files.expand(policy))
    if "://" in policy or policy.startswith(EMBEDDED) or not files.is_file(root / RUN):
        return
    numbers = [
        int(path.parent.name[5:]) for path in root.glob("iter_*/export") if path.parent.name[5:].isdigit()
    ]
    raise BadInput(
        f"{policy}: a run directory; name an iteration of it, as {policy}@{max(numbers, default=0)}"
    )


def _is_number(text: str) -> bool:
    """Whether a text is a whole number of at most nine digits."""
    return text.isascii() and text.isdigit() and len(text) < 10


def _number(flag: str, text: str) -> int:
    if not (_is_number(text) and 1 <= int(text) <= MOST):
        raise BadInput(f"{flag} {command.printable(text)[:80]}: must be a whole number from 1 to {MOST}")
    return int(text)


def main(words: Sequence[str]) -> None:
    """Evaluate what the command line asks for. Raises BadInput for one that cannot be used."""
    if "--help" in words or "-h" in words:
        print(command.as_called(USAGE))
        return
    asked = read(words)
    # Only now, since it imports jax: a wrong flag is refused at once.
    from sppo_jax.evaluation.command import run

    run(asked)

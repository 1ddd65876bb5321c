"""Inputs that people get wrong, made at random from a seed: command lines, configurations, data, checkpoints, run directories.

`make(kind, seed, number, work)` writes one case's files below `work` and returns its command. The same seed and number
give the same case.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sppo_jax.config import knobs
from sppo_jax.hub import names
from tests import run_directory
from tests.fuzz_damage import VALUES, change, misplace, shown, spoil, spoil_file
from tests.small_game import SMALL, words


@dataclass(frozen=True)
class Case:
    """One command, `python -m MODULE WORDS` in the directory of the case, and where it must leave nothing if refused."""

    kind: str
    about: str
    module: str
    words: list[str]
    out: Path | None = None


def make(kind: str, seed: int, number: int, work: Path) -> Case:
    """Write the files of case `number` of a kind below the empty directory `work`, and return the case."""
    return KINDS[kind](Random(f"{seed}:{kind}:{number}"), work)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


# The kinds of cases.


def _word(rng: Random) -> str:
    """A value as a command line can hold it."""
    return str(rng.choice(VALUES)).replace("\0", "").encode("utf-8", "replace").decode()[:100_000]


def _game(kind: str, about: str, work: Path, **options: Any) -> Case:
    out = work / "run"
    return Case(kind, about, "sppo_jax.main", words(out, **options), out)


def configuration(rng: Random, work: Path) -> Case:
    """A YAML file with wrong values, keys, sections, or bytes."""
    tree, done = _nested(SMALL), []
    for _ in range(rng.randint(0, 2)):
        tree, what = change(rng, tree)
        done.append(what)
    try:
        text = (
            yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)
            if rng.random() < 0.7
            else json.dumps(tree)
        )
        data = text.encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        data = json.dumps(tree).encode()
    if not done or rng.random() < 0.3:
        data, what = spoil(rng, data)
        done.append(what)
    path = work / "game.yaml"
    path.write_bytes(data)
    if rng.random() < 0.05:
        done.append(misplace(rng, path))
    out = work / "run"
    return Case(
        "configuration", "; ".join(done), "sppo_jax.main", ["--config", str(path), "--out", str(out)], out
    )


def flags(rng: Random, work: Path) -> Case:
    """A command line with values, names and order gone wrong."""
    out = work / "run"
    given = words(out)
    before = list(given)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(given))
        value = _word(rng)
        match rng.randrange(8):
            case 0 | 1 | 2:
                given[i | 1 if (i | 1) < len(given) else i] = value
            case 3:
                del given[i]
            case 4:
                given.insert(
                    i,
                    rng.choice(
                        (
                            value,
                            "--help",
                            "-h",
                            "--",
                            "-",
                            "--confg",
                            "--config",
                            "--config=",
                            "\N{EM DASH}seed",
                            "--seed=",
                        )
                    ),
                )
            case 5:
                given[i] = rng.choice(
                    (
                        given[i][:-1],
                        given[i] + "=",
                        f"-{given[i]}",
                        given[i][1:],
                        given[i].upper(),
                        given[i].replace(".", "-"),
                    )
                )
            case 6:
                rng.shuffle(given)
            case _:
                knob = rng.choice([k for k, *_ in knobs() if k != "out"])
                given += [f"--{knob}", value]
    new = [word for word in given if word not in before]
    return Case("flags", f"{shown(new)}, {len(given)} words of {len(before)}", "sppo_jax.main", given, out)


def prompts(rng: Random, work: Path) -> Case:
    """Training or held-out prompts in a damaged or unusual jsonl or parquet file."""
    texts = [
        json.loads(line)["prompt"]
        for line in names.path("prompts/train_1.jsonl").read_text().splitlines()[:12]
    ]
    rows: list[Any] = [{"prompt": text} for text in texts]
    if rng.random() < 0.5:
        rows = [
            {"prompt": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
            for text in texts
        ]
    path, done = _table(rng, work, "prompts", rows)
    knob = rng.choice(("prompts__source", "prompts__heldout"))
    scheme = rng.choice(("parquet", "jsonl")) if path.suffix in ("", ".gz") else path.suffix[1:]
    source = (
        f"{scheme}:{path}"
        if rng.random() < 0.9
        else f"{rng.choice(('', 'JSONL:', 'json:', 'file://', 'csv:', 'jsonl::'))}{path}"
    )
    return _game("prompts", f"{knob}: {done}", work, **{knob: source, "eval__oracle": ""})


def pairs(rng: Random, work: Path) -> Case:
    """Pairs of responses in a damaged or unusual jsonl or parquet file."""
    rows: list[Any] = [
        {
            "chosen": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "no"}],
            "chosen_probs": 0.75,
            "chosen_probs_win": 0.625,
            "chosen_probs_lose": 0.375,
        }
        for i in range(8)
    ]  # fmt: skip
    path, done = _table(rng, work, "pairs", rows)
    scheme = rng.choice(("parquet", "jsonl")) if path.suffix in ("", ".gz") else path.suffix[1:]
    return _game("pairs", done, work, pairs__source=f"{scheme}:{path}")


def _table(rng: Random, work: Path, name: str, rows: list[Any]) -> tuple[Path, str]:
    """A file with a few values of its rows changed, or its bytes."""
    done = []
    everywhere, (changed, what) = rng.random() < 0.2, change(rng, rows[0])
    for i in range(len(rows)) if everywhere else range(1):
        rows[i] = json.loads(json.dumps(changed))
    done.append(f"{'every' if everywhere else 'a'} row: {what}")
    path = work / f"{name}.jsonl"
    data = "\n".join(map(json.dumps, rows)).encode() + b"\n"
    if rng.random() < 0.4:
        try:
            table = pa.Table.from_pylist([row if isinstance(row, dict) else {"prompt": row} for row in rows])
            path = path.with_suffix(".parquet")
            pq.write_table(table, path)
            data = path.read_bytes()
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
            path = path.with_suffix(".jsonl")
    if rng.random() < 0.4:
        data, what = spoil(rng, data)
        done.append(what)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    if rng.random() < 0.06:
        done.append(misplace(rng, path))
    elif rng.random() < 0.15:
        path, what = _in_another_form(rng, path, rows)
        done.append(what)
    return path, f"{path.name}: {'; '.join(done)}"


def _in_another_form(rng: Random, path: Path, rows: list[Any]) -> tuple[Path, str]:
    """The file compressed, as one JSON value, or in a directory beside others."""
    data, how = path.read_bytes(), rng.choice(("gzip", "array", "object", "directory", "indented"))
    path.unlink()
    if how == "directory":
        path = path.with_name("parts")
        path.mkdir()
        for name in rng.choice(
            (["a.jsonl", "b.jsonl"], ["train.parquet"], ["a.jsonl", "README.md"], ["x"], [])
        ):
            (path / name).write_bytes(data)
    elif how == "gzip":
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(gzip.compress(data)[: rng.choice((None, None, 40))])
    else:
        value: Any = {"data": rows} if how == "object" else rows
        path.write_text(json.dumps(value, indent=2 if how == "indented" else None))
    return path, f"as {how}"


def model(rng: Random, work: Path) -> Case:
    """A checkpoint with a damaged or unusual file: config.json, tokenizer, weights, templates."""
    directory = work / "policy"
    directory.mkdir()
    for file in names.path("policy").iterdir():
        (directory / file.name).symlink_to(file)
    found = sorted(p.name for p in directory.iterdir())
    name = rng.choice((*found, *["config.json"] * 6, "tokenizer_config.json", "model.safetensors"))
    done = []
    if name == "model.safetensors":
        done.append(_spoil_weights(rng, directory / name))
    else:
        if name == "config.json" and rng.random() < 0.3:
            done.append(_as_other_family(rng, directory / name))
        done.append(spoil_file(rng, directory / name))
    return _game("model", "; ".join(done), work, model__path=directory)


def judge(rng: Random, work: Path) -> Case:
    """A PairRM with a damaged or missing file."""
    directory = work / "pairrm"
    shutil.copytree(names.path("pairrm"), directory)
    found = sorted(p.name for p in directory.iterdir() if p.is_file())
    name = rng.choice((*found, *["config.json"] * 3))
    spoilt = directory / name
    done = _spoil_weights(rng, spoilt) if spoilt.suffix == ".safetensors" else spoil_file(rng, spoilt)
    return _game("judge", done, work, judge__backend="jax", judge__path=directory, mesh__fsdp=-1)


def _as_other_family(rng: Random, path: Path) -> str:
    raw = json.loads(path.read_text())
    family = rng.choice(("Mistral", "Llama", "Gemma2", "Gemma", "Qwen2", "Qwen3", "Phi3", "Mixtral", "GPT2"))
    raw |= {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    extra = rng.choice(
        ({"sliding_window": 64}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"quantization_config": {"bits": 4}},
         {"layer_types": ["full_attention"]}, {"head_dim": 7}, {"num_key_value_heads": 3}, {"torch_dtype": "float8"},
         {"rope_scaling": {"rope_type": "llama3"}}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})
    )  # fmt: skip
    path.unlink()
    path.write_text(json.dumps(raw | extra))
    return f"as {family}, {extra}"


def _spoil_weights(rng: Random, path: Path) -> str:
    """Change the header of a safetensors file (names, shapes, dtypes, offsets), or its bytes."""
    data = path.read_bytes()
    path.unlink()
    if rng.random() < 0.4:
        spoilt, done = spoil(rng, data)
        path.write_bytes(spoilt)
        return f"{path.name}: {done}"
    size = int.from_bytes(data[:8], "little")
    header, done = change(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"{path.name}, header: {done}"


def resumed(rng: Random, work: Path) -> Case:
    """The run directory of a game that was begun, damaged, under the same command again."""
    run = run_directory.begun(work, *words(work / "out")[:-2])
    name = rng.choice(("config.yaml", "manifest.json", "metrics.jsonl", ".lock", "run itself"))
    run.metrics.write_text('{"iteration": 1, "stage": "judge", "step": 0}\n')
    (run.root / ".lock").write_text("process 1 on x\n")
    if name == "run itself":
        done = misplace(rng, run.root)
    elif name == "config.yaml" and rng.random() < 0.7:
        tree, done = change(rng, yaml.safe_load(run.config.read_text()))
        run.config.write_text(json.dumps(tree))
    else:
        done = spoil_file(rng, run.root / name)
    return Case("resumed", f"{name}: {done}", "sppo_jax.main", words(run.root))


def run(rng: Random, work: Path) -> Case:
    """The report, the card or the pairs of a run directory with damaged files."""
    found = rng.choice((run_directory.measured, run_directory.played))(work)
    files = sorted(p for p in found.root.rglob("*") if p.is_file() and p.name != "config.yaml")
    often = [p for p in files if p.suffix in (".json", ".jsonl")]
    done = [spoil_file(rng, rng.choice(files + 4 * often)) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.15:
        done.append(spoil_file(rng, found.config))
    if rng.random() < 0.2:
        extra = rng.choice(
            (
                "iter_²",
                "iter_01",
                "iter_x",
                "iter_",
                "iter_-1",
                "iter_99999999999999999999",
                "iter_٣",
                "iter_3",
                "iter_2.part",
            )
        )
        (found.root / extra).mkdir()
        done.append(extra)
    root = str(found.root)
    module, given = rng.choice(
        (*[("sppo_jax.report", ["--run", root])] * 6, *[("card", ["--run", root])] * 3,
         ("sppo_jax.interchange", ["--run", root, "--iteration", "1", "--to", str(work / "pairs.parquet")]))
    )  # fmt: skip
    return Case("run", f"{module}: {'; '.join(done)}", module, given)


def commands(rng: Random, work: Path) -> Case:
    """Flags of the smaller commands."""
    out = run_directory.measured(work).root if rng.random() < 0.5 else work / "nothing"
    commands = {
        "sppo_jax.report": ["--run", str(out)],
        "sppo_jax.interchange": [
            "--run",
            str(out),
            "--iteration",
            "1",
            "--to",
            str(work / "to" / "pairs.parquet"),
        ],
        "sppo_jax.export": ["--run", str(out), "--iteration", "1", "--to", str(work / "export")],
        "sppo_jax.chat": [
            "--policy",
            str(out),
            "--temperature",
            "0.5",
            "--top-p",
            "0.9",
            "--max-new-tokens",
            "9",
            "--seed",
            "1",
        ],
    }
    module = rng.choice(list(commands))
    given = commands[module]
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(given) or 1)
        value = _word(rng)
        match rng.randrange(6):
            case 0 | 1 if given:
                given[i] = value
            case 2 if given:
                del given[i]
            case 3:
                given.insert(
                    i,
                    rng.choice(
                        (value, "--help", "-h", "--", "--run", "--x", "--push", "--dtype", "--iteration")
                    ),
                )
            case 4:
                given += given[:2]
            case _:
                rng.shuffle(given)
    return Case("commands", f"{module} {shown([w.replace(str(work), 'WORK') for w in given])}", module, given)


KINDS: dict[str, Callable[[Random, Path], Case]] = {
    f.__name__: f for f in (configuration, flags, prompts, pairs, model, judge, resumed, run, commands)
}

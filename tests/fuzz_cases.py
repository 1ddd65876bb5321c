"""Inputs that people get wrong, made at random from a seed: command lines, configurations, data, checkpoints, run directories.

`make(kind, seed, number, work)` writes one case's files below `work` and returns its command. The same seed and number
give the same case.
"""

import codecs
import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sppo_jax import records
from sppo_jax.hub import names
from tests import run_directory
from tests.small_game import SMALL, words

DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, -7, 0.5, 1.5, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, -1e308, 1e-45, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "null", "none", "auto", "x" * 3000, "\x00", "\ud800", "\u202eabc",
    "\x1b[2J", "😀", "é", "a\nb", "\r\n", "2024-31-12", "2024-01-01", "0x10", "010", "1_000", "1e5", "1,5", "5e-7.", "yes",
    "no", "~", "~/x", "../..", ".", "/dev/null", "a/b", "a/b@c", "a:b", "os:system", "jsonl:", "hf:", "hf:a/b", "tfds:x",
    "embedded:policy", "embedded:nothing", "{{x}}", "{% if %}", "{iteration}", "%s%n", "NaN", "Infinity", "-0", "+1", "٣", "½",
    "²", [], [1], [None], ["a", "b"], {}, {"a": 1}, {"": None}, [[]], [{}], DEEP, "9" * 5001, "[" * 2000,
)  # fmt: skip
KEYS = ("", "x", "iteration", "path", "content", "role", "prompt", "é", "a.b", "0", "type", "model_type", "quantization_config")
ENCODINGS = ("utf-16", "utf-16-le", "utf-8-sig", "utf-32", "latin-1", "cp1252")


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


# Mutations: each returns what it did in a few words, beside the result.


def change(rng: Random, tree: Any) -> tuple[Any, str]:
    """Change one place of nested dicts and lists: replace, delete, rename, wrap, move, retype or scale."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places:
        value = rng.choice(VALUES)
        return value, f"all of it is {_shown(value)}"
    holder, key = rng.choice(places)
    old, where = holder[key], f"{key}"
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = rng.choice(VALUES)
            done = f"{where} = {_shown(holder[key])}"
        case 3:
            del holder[key]
            done = f"without {where}"
        case 4 if isinstance(holder, dict):
            new = rng.choice((*KEYS, key[:-1], key + "s", key.upper(), f" {key}"))
            holder[new] = holder.pop(key)
            done = f"{where} renamed {new!r}"
        case 5:
            holder[key] = rng.choice(([old], {"value": old}, [old, old], {key if isinstance(key, str) else "a": old}))
            done = f"{where} wrapped: {_shown(holder[key])}"
        case 6:
            other, theirs = rng.choice(places)
            holder[key], other[theirs] = other.get(theirs) if isinstance(other, dict) else None, old
            done = f"{where} and {theirs} swapped"
        case _:
            holder[key] = _retyped(rng, old)
            done = f"{where} = {_shown(holder[key])}"
    return tree, done


def _places(tree: Any) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _retyped(rng: Random, old: Any) -> Any:
    if isinstance(old, bool) or old is None:
        return rng.choice(("true", 1, 0, "null", not old))
    if isinstance(old, (int, float)):
        return rng.choice((str(old), -old, old * 1000, old / 7, float(old), old + 0.5, 0, old + 1, [old], f"{old} "))
    if isinstance(old, str):
        return rng.choice((old[: len(old) // 2], old + old, old.upper(), f" {old}", old + "\n", f"./{old}", list(old)[:5], len(old)))
    return rng.choice((json.dumps(old), None, len(old), str(old)))


def spoil(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Damage the bytes of a file as editors, shells, transfers and disks do."""
    at = rng.randrange(len(data) + 1)
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    text = data.decode("utf-8", "replace")
    code = rng.choice(ENCODINGS)
    ways: dict[str, Callable[[], bytes]] = {
        f"cut at byte {at}": lambda: data[:at],
        f"without its first {at} bytes": lambda: data[at:],
        "empty": lambda: b"",
        "blank": lambda: b" \n\n",
        "random bytes": lambda: rng.randbytes(200),
        "zeros": lambda: bytes(len(data)),
        f"random bytes at {at}": lambda: data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at + 4 :],
        f"NUL at {at}": lambda: data[:at] + b"\0" + data[at:],
        f"as {code}": lambda: text.encode(code, "replace"),
        "UTF-16 mark alone": lambda: codecs.BOM_UTF16_LE + data,
        "gzip": lambda: gzip.compress(data),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "CR": lambda: data.replace(b"\n", b"\r"),
        "twice": lambda: data + data,
        f"line {line} twice": lambda: b"\n".join(lines[: line + 1] + lines[line:]),
        f"without line {line}": lambda: b"\n".join(lines[:line] + lines[line + 1 :]),
        f"line {line} cut": lambda: b"\n".join([*lines[:line], lines[line][: len(lines[line]) // 2], *lines[line + 1 :]]),
        "single quotes": lambda: data.replace(b'"', b"'"),
        "HTML": lambda: b"<!DOCTYPE html><html><body>Not found</body></html>",
        "git-lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "tabs": lambda: data.replace(b"  ", b"\t"),
    }  # fmt: skip
    name = rng.choice(list(ways))
    return ways[name](), name


def misplace(rng: Random, path: Path) -> str:
    """Put something of another kind where a file is expected."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind = rng.choice(("missing", "a directory", "a link to nothing", "a link to itself", "/dev/null", "no permission"))
    if kind == "a directory":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "/dev/null":
        path.symlink_to("/dev/null")
    elif kind == "no permission":
        path.write_bytes(b"")
        path.chmod(0)
    return f"{path.name} is {kind}"


def spoil_file(rng: Random, path: Path) -> str:
    """Damage a file: its place, its bytes or, most often, the values in its JSON or JSON lines."""
    how = rng.randrange(10)
    if how == 0 or not path.is_file():
        return misplace(rng, path)
    data = path.read_bytes()
    path.unlink()  # it may be a link to the original
    try:
        trees = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else [json.loads(data)]
    except ValueError:
        trees = []
    if how < 3 or not trees:
        spoilt, done = spoil(rng, data)
    else:
        at = rng.randrange(len(trees))
        trees[at], done = change(rng, trees[at])
        spoilt = "\n".join(map(json.dumps, trees)).encode() + b"\n"
    path.write_bytes(spoilt)
    return f"{path.name}: {done}"


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:40]}… ({len(text)} characters)"


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


# The kinds of cases.


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
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5) if rng.random() < 0.7 else json.dumps(tree)
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
    return Case("configuration", "; ".join(done), "sppo_jax.main", ["--config", str(path), "--out", str(out)], out)


def flags(rng: Random, work: Path) -> Case:
    """A command line with values, names and order gone wrong."""
    out = work / "run"
    given = words(out)
    before = list(given)
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(given))
        value = str(rng.choice(VALUES)).replace("\0", "").encode("utf-8", "replace").decode()[:200_000]
        match rng.randrange(8):
            case 0 | 1 | 2:
                given[i | 1 if (i | 1) < len(given) else i] = value
            case 3:
                del given[i]
            case 4:
                given.insert(i, rng.choice((value, "--help", "-h", "--", "-", "--confg", "--config", "--config=", "\N{EM DASH}seed", "--seed=")))
            case 5:
                given[i] = rng.choice((given[i][:-1], given[i] + "=", f"-{given[i]}", given[i][1:], given[i].upper(), given[i].replace(".", "-")))
            case 6:
                rng.shuffle(given)
            case _:
                knob = rng.choice([k for k, *_ in _knobs() if k != "out"])
                given += [f"--{knob}", value]
    new = [word for word in given if word not in before]
    return Case("flags", f"{_shown(new)}, {len(given)} words of {len(before)}", "sppo_jax.main", given, out)


def _knobs() -> Any:
    from sppo_jax.config import knobs

    return knobs()


def prompts(rng: Random, work: Path) -> Case:
    """Training or held-out prompts in a damaged or unusual jsonl or parquet file."""
    texts = [json.loads(line)["prompt"] for line in names.path("prompts/train_1.jsonl").read_text().splitlines()[:12]]
    rows: list[Any] = [{"prompt": text} for text in texts]
    if rng.random() < 0.5:
        rows = [{"prompt": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in texts]
    path, done = _table(rng, work, "prompts", rows)
    knob = rng.choice(("prompts__source", "prompts__heldout"))
    scheme = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = f"{scheme}:{path}" if rng.random() < 0.9 else f"{rng.choice(('', 'JSONL:', 'json:', 'file://', 'csv:', 'jsonl::'))}{path}"
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
    scheme = "parquet" if path.suffix == ".parquet" else "jsonl"
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
    return path, f"{path.name}: {'; '.join(done)}"


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
    found = run_directory.measured(work)
    files = sorted(p for p in found.root.rglob("*") if p.is_file() and p.name != "config.yaml")
    often = [p for p in files if p.suffix in (".json", ".jsonl")]
    done = []
    for _ in range(rng.randint(1, 2)):
        done.append(spoil_file(rng, rng.choice(files + 4 * often)))
    if rng.random() < 0.15:
        done.append(spoil_file(rng, found.config))
    if rng.random() < 0.2:
        extra = rng.choice(("iter_²", "iter_01", "iter_x", "iter_", "iter_-1", "iter_99999999999999999999", "iter_٣", "iter_3", "iter_2.part"))
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
        "sppo_jax.interchange": ["--run", str(out), "--iteration", "1", "--to", str(work / "to" / "pairs.parquet")],
        "sppo_jax.export": ["--run", str(out), "--iteration", "1", "--to", str(work / "export")],
        "sppo_jax.chat": ["--policy", str(out), "--temperature", "0.5", "--top-p", "0.9", "--max-new-tokens", "9", "--seed", "1"],
    }
    module = rng.choice(list(commands))
    given = commands[module]
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(given) or 1)
        value = str(rng.choice(VALUES)).replace("\0", "").encode("utf-8", "replace").decode()[:100_000]
        match rng.randrange(6):
            case 0 | 1 if given:
                given[i] = value
            case 2 if given:
                del given[i]
            case 3:
                given.insert(i, rng.choice((value, "--help", "-h", "--", "--run", "--x", "--push", "--dtype", "--iteration")))
            case 4:
                given += given[:2]
            case _:
                rng.shuffle(given)
    return Case("commands", f"{module} {_shown([w.replace(str(work), 'WORK') for w in given])}", module, given)


KINDS: dict[str, Callable[[Random, Path], Case]] = {
    f.__name__: f for f in (configuration, flags, prompts, pairs, model, resumed, run, commands)
}
assert os.sep == "/" and records.SCHEMAS

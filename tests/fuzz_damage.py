"""Ways in which people, editors, shells, transfers and disks damage values, files and their places, at random."""

import codecs
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

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
KEYS = (
    "",
    "x",
    "iteration",
    "path",
    "content",
    "role",
    "prompt",
    "é",
    "a.b",
    "0",
    "type",
    "model_type",
    "quantization_config",
)
ENCODINGS = ("utf-16", "utf-16-le", "utf-8-sig", "utf-32", "latin-1", "cp1252")


# Each function returns what it did in a few words, beside the result.


def change(rng: Random, tree: Any) -> tuple[Any, str]:
    """Change one place of nested dicts and lists: replace, delete, rename, wrap, move, retype or scale."""
    tree = json.loads(json.dumps(tree))
    places = list(_places(tree))
    if not places:
        value = rng.choice(VALUES)
        return value, f"all of it is {shown(value)}"
    holder, key = rng.choice(places)
    old, where = holder[key], f"{key}"
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = rng.choice(VALUES)
            done = f"{where} = {shown(holder[key])}"
        case 3:
            del holder[key]
            done = f"without {where}"
        case 4 if isinstance(holder, dict):
            new = rng.choice((*KEYS, key[:-1], key + "s", key.upper(), f" {key}"))
            holder[new] = holder.pop(key)
            done = f"{where} renamed {new!r}"
        case 5:
            holder[key] = rng.choice(
                ([old], {"value": old}, [old, old], {key if isinstance(key, str) else "a": old})
            )
            done = f"{where} wrapped: {shown(holder[key])}"
        case 6:
            other, theirs = rng.choice(places)
            holder[key], other[theirs] = other.get(theirs) if isinstance(other, dict) else None, old
            done = f"{where} and {theirs} swapped"
        case _:
            holder[key] = _retyped(rng, old)
            done = f"{where} = {shown(holder[key])}"
    return tree, done


def _places(tree: Any) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _retyped(rng: Random, old: Any) -> Any:
    if isinstance(old, bool) or old is None:
        return rng.choice(("true", 1, 0, "null", not old))
    if isinstance(old, (int, float)):
        return rng.choice(
            (str(old), -old, old * 1000, old / 7, float(old), old + 0.5, 0, old + 1, [old], f"{old} ")
        )
    if isinstance(old, str):
        return rng.choice(
            (
                old[: len(old) // 2],
                old + old,
                old.upper(),
                f" {old}",
                old + "\n",
                f"./{old}",
                list(old)[:5],
                len(old),
            )
        )
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
    kind = rng.choice(
        ("missing", "a directory", "a link to nothing", "a link to itself", "/dev/null", "no permission")
    )
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
        trees = (
            [json.loads(line) for line in data.splitlines()]
            if path.suffix == ".jsonl"
            else [json.loads(data)]
        )
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


def shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:40]}… ({len(text)} characters)"

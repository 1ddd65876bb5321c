"""The pages for people: their links lead somewhere, and their commands are ones that the commands' own parsers take."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from examples import ifollow
from sppo_jax import chat, command, config_file, export, interchange
from sppo_jax.compare import flags as compare_flags
from sppo_jax.evaluation import flags as evaluate_flags
from sppo_jax.evaluation import ranking
from sppo_jax.plan import __main__ as plan
from sppo_jax.report import __main__ as report
from sppo_jax.settings import words as command_line

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for folder in (ROOT, ROOT / "docs", ROOT / "configs", ROOT / "tests")
    for path in folder.glob("*.md")
)
SHELLS = ("", "sh", "bash")
PROGRAMS = r"(?:python3?|\.venv/bin/python|make|pip|sppo_jax|launch/[\w.]+)"
COMMAND = re.compile(rf"(?:\w+=\S+ )*{PROGRAMS} .+")
ALIASES = {"train": "main"}  # `sppo_jax train` is `python -m sppo_jax.main`
HTML = re.compile(r"<img[^>]*\bsrc=\"([^\"]+)\"")


class Taken(Exception):
    """The parser has taken the words, and the command would begin."""


def fences(text):
    """Yield (language, lines) of the fenced blocks of a page."""
    for language, body in re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield language, body.replace("\\\n", " ").splitlines()


def commands(path):
    """The commands of a page, or of the comments at the head of a configuration: lines of blocks, and code spans."""
    text = path.read_text()
    if path.suffix == ".yaml":
        head = "".join(line.removeprefix("#") for line in text.splitlines(True) if line.startswith("#"))
        found = [line.strip() for line in head.replace("\\\n", " ").splitlines()]
    else:
        found = [line.strip() for language, body in fences(text) if language in SHELLS for line in body]
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found += [" ".join(span.replace("\\|", "|").split()) for span in re.findall(r"`([^`]+)`", text)]
    return [line for line in found if COMMAND.fullmatch(line) and not re.search(r"sppo_jax[. ]NAME\b", line)]


COMMANDS = [
    pytest.param(line, id=f"{path.name}: {line[:60]}")
    for path in [*(ROOT / page for page in PAGES), *sorted((ROOT / "configs").glob("*.yaml"))]
    if path.name != "CHANGELOG.md"  # it has commands of earlier versions, too
    for line in dict.fromkeys(commands(path))
]


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_anchors_resolve(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *HTML.findall(text)]:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = ROOT / page.parent / name if name else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory where what the pages name is there: configurations, a file, runs. Parsers end in Taken."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "benchmarks", "examples", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "FILE").write_text("seed: 1\n")

    def read(parser, words, read=command.Flags.read):
        read(parser, words)
        raise Taken

    monkeypatch.setattr(command.Flags, "read", read)
    return tmp_path


def check(module, words, place):
    """Raise unless the command `module` takes these words."""
    if module == "main":
        files, overrides = command_line.split(words, {"--config": True, "--quiet": False})
        config_file.load([file for _, file in files], overrides)
    elif module == "plan":
        files, _, overrides = plan.parse(words)
        config_file.load(files, overrides)
    elif module == "evaluate":
        for word in words:
            if run := re.fullmatch(r"(\w[\w/-]*)@\d+", word):
                (place / run[1]).mkdir(parents=True, exist_ok=True)
                (place / run[1] / "config.yaml").write_text((ROOT / "configs/mistral_7b.yaml").read_text())
        evaluate_flags.read(words)
    elif module == "compare":
        if "smollm2_ifollow" in words:
            ifollow.write(place / "ifollow")  # as the command before it does
        for word in words:
            if source := re.fullmatch(r"jsonl:(runs/[\w.]+)", word):  # which a command before it makes
                (place / source[1]).parent.mkdir(exist_ok=True)
                (place / source[1]).write_text('{"prompt": ""}\n')
        compare_flags.read(words)
    elif module == "judge":
        asked = words[words.index("--in") + 1]
        (place / asked.partition(":")[2 if ":" in asked else 0]).write_text(
            '{"prompt": "", "responses": []}\n'
        )
        ranking.parse(words)
    else:
        with pytest.raises(Taken):
            {"export": export, "chat": chat, "interchange": interchange, "report": report}[module].main(words)


def check_python(words, place):
    """Check the words after `python`. Programs of others, and code after -c, are left alone."""
    if words[0] == "-m" and words[1].split(".")[0] == "sppo_jax":
        name = words[1].removeprefix("sppo_jax.")
        if "." in name or name == "config":
            assert importlib.util.find_spec(words[1]), words[1]
            return
        assert name in command.COMMANDS, name
        if words[2:]:
            check(name, words[2:], place)
    elif words[0].startswith(("benchmarks/", "examples/")):
        text = (ROOT / words[0]).read_text()
        for flag in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
            assert f'"{flag}"' in text, flag


def check_pip(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-r", "--requirement"):
            assert (ROOT / word).is_file(), word
        if extras := re.fullmatch(r"(?:\.|sppo_jax)\[([\w,-]+)\]", word):
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), word


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_taken(line, place):
    line = re.sub(r" \[(--[^\]]*)\]", r" \1", line)  # optional flags
    for part in re.sub(r" (?:…|\.\.\.)(?= |$)", "", line).split(" && "):
        words = [re.sub(r"^(\w+)(\|\w+)+$", r"\1", word) for word in shlex.split(part, comments=True)]
        while re.match(r"\w+=", words[0]):
            words.pop(0)
        program, *rest = words
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets)
        elif program == "pip":
            check_pip(rest)
        elif program == "sppo_jax":
            name = ALIASES.get(rest[0], rest[0])
            if not name.startswith("--"):
                check_python(["-m", f"sppo_jax.{name}", *rest[1:]], place)
        elif program.startswith("launch/"):
            assert (ROOT / program).is_file(), program
        elif program.endswith(("python", "python3")):
            check_python(rest, place)


def test_there_are_commands_of_every_kind():
    lines = [param.values[0] for param in COMMANDS]
    assert len(lines) > 40
    for module in set(command.COMMANDS) - {"config"}:
        assert any(re.search(rf"sppo_jax[. ]{module}\b", line) for line in lines), module

"""docs/operations.md and docs/gpu.md say what the launch files, the commands and the knobs say."""

import re
from pathlib import Path

import pytest

from sppo_jax import command
from sppo_jax.config import knobs
from sppo_jax.fit import SKIPPED
from sppo_jax.run import directory, stage

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("operations", "gpu")}
FILES = sorted(path for path in (ROOT / "launch").iterdir() if path.is_file())


def commands(text):
    """The code spans that name a launch file and have arguments."""
    spans = (span.replace("\\|", "|") for span in re.findall(r"`([^`]*launch/[^`]*)`", text))
    return [span for span in spans if " " in span]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_stands_in_the_file_that_it_names(page):
    found = commands(PAGES[page])
    assert len(found) >= 2
    for line in found:
        name = re.search(r"launch/[\w.]+", line)[0]
        assert line in (ROOT / name).read_text(), line


def test_every_launch_file_is_named():
    assert len(FILES) > 8
    for path in FILES:
        assert f"launch/{path.name}" in PAGES["operations"], path.name


def test_every_exit_code_has_its_row():
    rows = re.findall(r"^\| (\d+) \|", PAGES["operations"], re.MULTILINE)
    assert rows == ["0", "1", str(command.BAD_INPUT), "130", "143", str(command.LOST)]


def test_every_knob_exists_and_time_outs_are_those_of_the_code():
    defaults = {knob.key: knob.default for knob in knobs()}
    for text in PAGES.values():
        for name in re.findall(r"`(?:--)?((?:distributed|fit|judge|model|sampling|mesh)\.\w+)", text):
            assert name in defaults, name
    text = PAGES["operations"]
    assert f"`distributed.heartbeat_timeout` seconds ({defaults['distributed.heartbeat_timeout']})" in text
    assert (
        f"`distributed.initialization_timeout` seconds ({defaults['distributed.initialization_timeout']})"
        in text
    )
    assert f"within {directory.MARK_SECONDS} seconds" in text
    assert f"up to {stage.LATE_SECONDS} seconds" in text
    assert SKIPPED == 5
    assert "the sixth in a row" in text

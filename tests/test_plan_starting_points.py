"""The table of docs/your-data.md: every figure is the plan's."""

import re
from pathlib import Path

import pytest

from sppo_jax import config_file
from sppo_jax.plan import config_header, starting_points

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs/your-data.md"


@pytest.mark.parametrize(
    "start", starting_points.STARTS, ids=lambda s: f"{s.model.split('/')[1]}-{s.slice}-{s.rank}"
)
def test_a_starting_point_of_the_documentation_is_its_plan(start):
    """`python -m sppo_jax.plan.starting_points` prints the rows: copy them after a change of a formula."""
    assert start.row() in DOCS.read_text().splitlines()


def test_the_documentation_has_all_starting_points_and_no_other():
    text = DOCS.read_text()
    table = text[text.index("\n".join(starting_points.HEAD)) :].split("\n\n")[0].splitlines()
    assert len(table) == len(starting_points.HEAD) + len(starting_points.STARTS)


def test_the_flags_of_the_starting_points_are_documented_beside_the_configuration_that_they_change():
    assert starting_points.COMMON in DOCS.read_text()
    start = starting_points.STARTS[0]
    alone = config_file.load([], start.flags)
    whole = config_file.load(
        [ROOT / "configs/own.yaml"], [w for w in start.flags if w not in starting_points.OWN.split()]
    )
    assert config_header.digest(alone) == config_header.digest(whole)


@pytest.mark.parametrize("name", ["mistral_7b", "gemma2_9b"])
def test_the_papers_setting_has_the_time_of_its_configurations_header(name):
    header = (ROOT / f"configs/{name}.yaml").read_text()
    hours = re.search(r"v5e:4x4 .*: iteration ([0-9.]+ h) ", header)[1]
    assert hours in DOCS.read_text()

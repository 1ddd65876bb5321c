"""The table of docs/your-data.md: every figure is the plan's."""

from pathlib import Path

import pytest

from sppo_jax.plan import starting_points

DOCS = Path(__file__).parent.parent / "docs/your-data.md"


@pytest.mark.parametrize(
    "start", starting_points.STARTS, ids=lambda s: f"{s.model.split('/')[1]}-{s.slice}-{s.rank}"
)
def test_a_starting_point_of_the_documentation_is_its_plan(start):
    """`python -m sppo_jax.plan.starting_points` prints the rows: copy them after a change of a formula or of configs/own.yaml."""
    assert start.row() in DOCS.read_text().splitlines()


def test_the_documentation_has_no_other_starting_points():
    text = DOCS.read_text()
    table = text[text.index("\n".join(starting_points.HEAD)) :].split("\n\n")[0].splitlines()
    assert len(table) == len(starting_points.HEAD) + len(starting_points.STARTS)
    for word in starting_points.COMMON.split():
        assert word in text, word

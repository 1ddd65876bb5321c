"""docs/files.md: a game writes the files and the fields that it names, and no others."""

import json
import re
from pathlib import Path

from sppo_jax.run import layout
from sppo_jax.run.directory import LOCK, RunDir

PAGE = Path(__file__).parents[1] / "docs/files.md"
ALWAYS = {"iteration", "stage", "step", "time"}


def lines(out):
    return [json.loads(line) for line in RunDir(out).metrics.read_text().splitlines()]


def as_pattern(path):
    """The regular expression of a documented path: any iteration, any shard, all below a folder."""
    text = re.escape(str(path.relative_to(layout.RUN.root)))
    text = text.replace("iter_1", r"iter_[1-9]\d*").replace("00000\\-of\\-00008", r"\d{5}\-of\-\d{5}")
    return text if path.suffix else text + "/.*"


def test_the_page_is_in_step_with_the_code():
    """If this fails: make files-docs."""
    assert PAGE.read_text() == layout.markdown()


def test_every_field_that_a_game_writes_is_documented(played):
    known = {(field.stage, field.name) for field in layout.FIELDS}
    written = {(line["stage"], name) for line in lines(played) for name in line if name not in ALWAYS}
    missing = written - known
    assert not missing, f"add to FIELDS of sppo_jax/run/layout.py: {sorted(missing)}"


def test_every_field_without_a_condition_is_written(played):
    written = {(line["stage"], name) for line in lines(played) for name in line}
    stages = {stage for stage, _ in written}
    always = {(f.stage, f.name) for f in layout.FIELDS if not f.when and f.stage in stages}
    assert len(stages) >= 7
    assert always <= written


def test_every_file_that_a_game_writes_is_documented_and_the_other_way_round(played):
    found = {str(path.relative_to(played)) for path in played.rglob("*") if path.is_file()} - {LOCK}
    patterns = {str(path): re.compile(as_pattern(path)) for path, _ in layout.FILES}
    for name in found:
        assert any(pattern.fullmatch(name) for pattern in patterns.values()), name
    only_if_asked = {str(layout.RUN.profile), str(layout.RUN.adapter(1))}
    for path in patterns.keys() - only_if_asked:
        assert any(patterns[path].fullmatch(name) for name in found), path

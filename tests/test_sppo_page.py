"""docs/sppo.md and docs/differences.md name functions, knobs and configurations that exist."""

import ast
import re
from pathlib import Path

import pytest

from sppo_jax import config
from sppo_jax.config import knobs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/sppo.md").read_text()
REFERENCES = re.findall(r"\[`([\w.]+)`\]\(\.\./(sppo_jax/[\w/]+\.py)\)", PAGE)


def defined(path):
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_every_function_is_in_the_file_that_the_page_names():
    assert len(REFERENCES) > 15
    for name, file in REFERENCES:
        room, _, function = name.rpartition(".")
        assert function in defined(ROOT / file), name
        assert file.removesuffix(".py").endswith(room.replace(".", "/")), name


def test_every_stage_has_its_step():
    files = {Path(file).stem for _, file in REFERENCES}
    assert files >= {
        "prompts",
        "respond",
        "judge",
        "preferences",
        "pairs",
        "fit",
        "losses",
        "export",
        "evaluate",
    }


@pytest.mark.parametrize("name", ["sppo", "differences"])
def test_knobs_and_their_values_exist(name):
    kinds = {knob.key: knob for knob in knobs()}
    sections = "|".join({key.split(".")[0] for key in kinds if "." in key})
    text = (ROOT / f"docs/{name}.md").read_text()
    found = re.findall(rf"(?<!\[)`((?:{sections})\.(?!parquet|json)\w+)(?:: (\w+))?`", text)
    assert found
    for key, value in found:
        assert key in kinds, key
        if value and not value.isdigit():
            assert value in re.split(r" ?\| ?", kinds[key].kind), (key, value)


def test_the_official_codes_choices_are_those_of_its_overlay():
    overlay = (ROOT / "configs/official_code.yaml").read_text()
    for choice in ("temperature: 0.7", "top_p: 0.9", "estimator: score", "prompt: chat"):
        assert choice in overlay
    defaults = config.flat(config.Config())
    assert defaults["judge.sharpness"] == 1
    assert defaults["pairs.select"] == "best_worst"
    assert defaults["fit.baseline"] == 0.5

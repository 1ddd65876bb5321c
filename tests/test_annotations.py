"""The shapes in annotations are checked at every call, in every module that has them."""

import ast
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

import sppo_jax
from sppo_jax.models import trees
from tests.typechecker import CHECKED

PACKAGE = Path(sppo_jax.__file__).parent


def annotated() -> list[str]:
    """Names of the modules that import from jaxtyping."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "jaxtyping" in named:
                found.append(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
                break
    return found


def test_every_module_with_annotations_of_shapes_is_checked():
    modules = annotated()
    assert "sppo_jax.models.attention" in modules
    left_out = [name for name in modules if not any(f"{name}.".startswith(f"{room}.") for room in CHECKED)]
    assert not left_out, f"add to CHECKED in tests/typechecker.py: {', '.join(left_out)}"


@pytest.mark.parametrize("name", CHECKED)
def test_every_name_that_is_checked_exists(name):
    assert importlib.util.find_spec(name) is not None


def test_a_wrong_dtype_and_a_wrong_shape_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        trees.positions(jnp.zeros((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError):
        trees.positions(jnp.zeros(3, jnp.int32))

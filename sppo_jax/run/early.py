"""What a configuration names and this machine lacks, found before jax and the libraries are imported, which takes seconds.

The rest is found where it is read.
"""

import ast
import contextlib
import difflib
import importlib.util
from pathlib import Path

from sppo_jax import files
from sppo_jax.config import Config
from sppo_jax.errors import BadInput, about
from sppo_jax.hub import names

FILES = ("jsonl:", "parquet:")  # schemes of sources that are on a disk
DISTANT = "://"  # in the name of a file elsewhere
SHOWN = 10  # names of a module in a message
ANYTHING = {"*", "__getattr__", "globals", "exec", "setattr"}  # with one of these a module may have any name
OF_THE_SOURCE = (
    ": examples/ comes with the source and is not installed; start in the folder of a clone, or name your own "
    "(docs/your-data.md)"
)
EACH = "{iteration}"  # a source with it names a file for each iteration


def check(config: Config) -> None:
    """Raise BadInput for a model, a judge or prompts of a configuration that are not where it says."""
    checkpoints, modules = {"model.path": config.model.path}, {"eval.oracle": config.eval.oracle}
    if ":" in config.judge.backend:
        modules["judge.backend"] = config.judge.backend
    else:
        checkpoints["judge.path"] = config.judge.path
    for key, name in checkpoints.items():
        with about(f"{key}="):
            names.check(name)
    for key, name in modules.items():
        _check_module(key, name)
    for key, name in (
        ("pairs.source", config.pairs.source),
        ("responses.source", config.responses.source),
        ("prompts.source", "" if config.pairs.source else config.prompts.source),
        ("prompts.heldout", config.prompts.heldout),
    ):
        _check_file(key, name)


def _check_module(key: str, name: str) -> None:
    """Raise BadInput where no such module:attribute can be: its code runs later."""
    module, colon, attribute = name.partition(":")
    top = module.partition(".")[0]
    if not name:
        return
    form = "a judge is module:attribute, a function without arguments in a module that Python finds from here"
    if not (colon and attribute and top):
        raise BadInput(f"{key}={name}: {form}, as rules:judge of rules.py")
    if not top.isidentifier():
        return
    if importlib.util.find_spec(top) is None:
        raise BadInput(
            f"{key}={name}: there is no module {top!r} (no {top}.py){_near_module(name, top) or _of_the_source(top)}; {form}"
        )
    with contextlib.suppress(LookupError):
        path = source(module)
        if (found := _names(path)) and attribute not in found:
            near = difflib.get_close_matches(attribute, found, n=1)
            meant = (
                f"did you mean {module}:{near[0]}?" if near else f"it has {', '.join(sorted(found)[:SHOWN])}"
            )
            raise BadInput(f"{key}={name}: {path.name} has no {attribute!r}; {meant}")


def source(module: str) -> Path:
    """The file with the text of a module, which is not imported. Raises LookupError where it is not found."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if all(name.isidentifier() for name in (top, *rest)) else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        place = Path(folder).joinpath(*rest)
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if files.is_file(path):
                return path
    if spec is None or spec.origin is None or rest or not files.is_file(Path(spec.origin)):
        raise LookupError(module)
    return Path(spec.origin)


def _near_module(name: str, top: str) -> str:
    """The end of the line about a module that is not there: the one in this folder that may be meant."""
    here = [path.stem for path in Path().iterdir() if path.suffix == ".py" or path.is_dir()]
    near = difflib.get_close_matches(top, here, n=1)
    return f"; did you mean {near[0]}{name.removeprefix(top)}?" if near else ""


def _of_the_source(first: str) -> str:
    """The end of the line about a file or module of examples/, which the package that pip installs does not have."""
    return OF_THE_SOURCE if first == "examples" else ""


def _names(path: Path) -> set[str]:
    """The names that a module's own text binds outside of functions; empty where it may bind others, or cannot be read.

    The module is not run: that may take long, and comes after the other checks.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return set()
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
                continue
            if isinstance(node, ast.alias):
                found.add(node.asname or node.name.partition(".")[0])
            elif isinstance(node, ast.Name):
                found.add(node.id)  # read or bound: one that is only read is no reason to refuse
            todo.append(node)
    return set() if found & ANYTHING else found


def _check_file(key: str, source: str) -> None:
    """Raise BadInput where the first file of a source is not there."""
    scheme, _, path = source.partition(":")
    if f"{scheme}:" not in FILES or not path or DISTANT in path or "*" in path:
        return
    first = Path(path.replace(EACH, "1"))
    if not files.exists(names.resolve(str(first))):
        more = files.near(first) or ("" if files.exists(Path("examples")) else _of_the_source(first.parts[0]))
        raise BadInput(f"{key}={source}: no such file {first}{more}")

"""Eight CPU devices, shapes and types checked at every call, and small inputs that several files share."""

import functools
import os
import signal
import tempfile

from tests import xla_flags

# A worker of xdist inherits this environment: all tests and all processes that they start share the programs that
# one of them has compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.devices(8)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

from tests import typechecker

hook = install_import_hook(list(typechecker.CHECKED), "tests.typechecker.check")

import fcntl
from pathlib import Path

import jax
import pytest
from jax._src import lru_cache

from sppo_jax import main, sharding
from sppo_jax.hub import names
from sppo_jax.models import hf
from sppo_jax.models.architecture import Architecture, Rope
from sppo_jax.text import chat_template
from tests import families
from tests.buckets import caches  # noqa: F401  (a fixture)
from tests.small_game import words


def put(self, key, value):
    """Write an entry of the cache of programs whole or not at all, since another process may read it meanwhile."""
    path = Path(self.path) / f"{key}{lru_cache._CACHE_SUFFIX}"
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)


lru_cache.LRUCache.put = put

# Awkward on purpose: grouped queries, a window shorter than the texts, head_dim != D / H, an untied head.
ODD = Architecture(
    vocab=102, model=48, mlp=80, layers=3, heads=6, kv_heads=2, head_dim=10, norm_eps=1e-5, rope=Rope(10_000.0),
    max_positions=128, window=7, tied=False,
)  # fmt: skip

# The files that take longest, which begin first, so that the workers end at about the same time.
LONGEST = [
    "hosts",
    "lora",
    "fit",
    "processes",
    "plan",
    "update",
    "sampler",
    "pod",
    "logprob",
    "families",
    "resume",
    "faults",
    "anchor",
    "endtoend",
    "hub",
    "pairrm_jax",
    "families_play",
    "judges",
    "quantize",
]


# Whole games that are stopped, killed or played in several processes, and what needs another environment: `make test-long`.
LONG = [
    "hosts",
    "processes",
    "gpu_benchmark",
    "compare_play",
    "families_play",
    "faults",
    "kills",
    "package",
    "resume",
    "talk",
    "anchor",
    "example",
]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in {f"test_{name}.py" for name in LONG}:
            item.add_marker(pytest.mark.long)
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def _signals():
    """A command leaves signals ignored at its end; the next test's processes would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    return chat_template.load_tokenizer(names.path("policy"))


@pytest.fixture(scope="session")
def family_directories(tmp_path_factory):
    """Directories with the small tokenizers of all families, by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: families.write(family, root / name) for name, family in families.FAMILIES.items()}


@pytest.fixture(scope="session")
def load_family(family_directories):
    """A function from the name of a family to its tokenizer."""
    return functools.cache(lambda name: chat_template.load_tokenizer(family_directories[name]))


@pytest.fixture(params=families.FAMILIES)
def family_name(request):
    return request.param


@pytest.fixture
def chat(load_family, family_name):
    """The tokenizer of each family in turn."""
    return load_family(family_name)


@pytest.fixture(scope="session")
def policy():
    """The embedded policy on one device."""
    return hf.load(names.path("policy"))


@pytest.fixture(scope="session")
def one_device():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
    return sharding.make_mesh(1, 4, 2)


@pytest.fixture
def odd_model(one_device):
    """A random model of the odd architecture, with weights large enough that logits differ."""
    model = hf.initialise(ODD, jax.random.key(0), one_device)
    for name, param in [("embedding", model.embedding), ("head", model.head), *model.layers.items()]:
        if "norm" not in name:
            param[...] = param[...] * 8
    return model


@pytest.fixture
def single_device(monkeypatch):
    """A run in this process sees one device, until the test undoes it."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])
    return monkeypatch


@pytest.fixture(scope="session")
def played(tmp_path_factory):
    """The directory of a small game of two iterations, played once for all workers: tests only read it, or copy it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    devices, out = jax.devices(), root / "played"
    with (root / "played.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "report.html").exists():
            patch.setattr(jax, "devices", lambda *_: devices[:1])
            main.main(words(out, iterations=2))
    return out

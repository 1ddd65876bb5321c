"""Two processes of a pod, four CPU devices each, that do several things one after another: sample, and play games.

`main` is what each of them calls, as the preparation of a process of tests.nursery.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from sppo_jax import config_file, models, selfplay, session, sharding
from sppo_jax.config import Distributed, Sampling
from sppo_jax.hub import names
from sppo_jax.run import cluster, pod
from sppo_jax.sampler import Sampler, paged_attention
from sppo_jax.settings import words as command_line
from sppo_jax.text import chat_template
from tests import kill_points, xla_flags
from tests.small_game import words

PROMPTS = [f"What is {word}?" for word in ("rain", "a fox", "two and two", "the sea")]
SAMPLING = Sampling(responses=2, max_new_tokens=10, slots=8)
EVERY = 6  # of the moments of a kill one in so many is played: each takes some 6 s
MESH = {"mesh__fsdp": 4, "mesh__tensor": 2}


def main(coordinator, rank, root):
    """Write into `root` what the two have sampled, the game, and the ends of games killed at every rename; then end."""
    os.environ["XLA_FLAGS"] = xla_flags.devices(4)
    root = Path(root)
    with cluster.joined(Distributed(coordinator, rank, 2, initialization_timeout=60)):
        (root / f"sampled-{rank}.json").write_text(json.dumps(sampled(rank)))
        play(root / "whole", kill_points.watch(root / "whole", Copies(root, rank)))
        for name in pod.agreed("killed", lambda: chosen(root)):
            play(root / name)
    sys.exit()


def chosen(root):
    """The names of the killed games that are played: every sixth; with KILL_POINTS=all in the environment all of them."""
    killed = sorted(root.glob("killed-*"))
    (root / "killed.json").write_text(json.dumps([out.name for out in killed]))
    if os.environ.get("KILL_POINTS") != "all":
        for out in set(killed) - set(killed[::EVERY]):
            shutil.rmtree(out)
    return [out.name for out in killed if out.exists()]


def sampled(rank):
    """What this process samples on meshes of both: a replica on its own devices, and for a kernel's sake one over all."""
    tokenizer = chat_template.load_tokenizer(names.path("policy"))
    found = []
    for tensor, supported in ((1, range(9)), (1, [8])):
        paged_attention.supported, plain = lambda *_, it=supported: it.__contains__, paged_attention.supported
        mesh = sharding.make_mesh(1, -1, tensor)
        sampler = Sampler(models.load(names.path("policy"), mesh=mesh), tokenizer, SAMPLING, mesh)
        paged_attention.supported = plain
        asked = PROMPTS[rank::2] if sampler.alone else PROMPTS
        rows = [row.response_ids for row in sampler.generate(asked, seed=0)]
        found.append({
            "alone": sampler.alone, "mesh": list(sampler.mesh.shape.values()), "slots": sampler.stats.slots, "rows": rows,
        })  # fmt: skip
    return found


class Copies:
    """Copies the game's directory whenever this process renames something: what a kill would leave."""

    def __init__(self, root, rank):
        self._root, self._rank, self._made = root, rank, 0

    def __call__(self, path, when):
        name = f"killed-{self._rank}-{self._made:02}-{when}-{path.replace('/', '_')}"
        self._made += 1
        kill_points.copy(self._root / "whole", self._root / name)


def play(out, end=lambda: None):
    """Play the small game in `out`, as the command does."""
    config = config_file.load([], command_line.split(words(out, **MESH), {})[1])
    with session.opened(config) as opened:
        selfplay.play(opened)
    end()
    pod.meet("played")

"""One process of a pod of two, two CPU devices each: samples on a mesh over both and prints its responses.

python tests/pod_process.py PORT RANK
"""

import json
import sys

import jax

PROMPTS = [f"What is {word}?" for word in ("rain", "a fox", "two and two", "the sea")]


def main(port: str, rank: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
    from sppo_jax import models, sharding
    from sppo_jax.config import Sampling
    from sppo_jax.hub import names
    from sppo_jax.sampler import Sampler, paged_attention
    from sppo_jax.text import chat_template

    tokenizer = chat_template.load_tokenizer(names.path("policy"))
    sampling = Sampling(responses=2, max_new_tokens=10, slots=8)
    # A replica on each device; one over all, of both processes; the same for a kernel's sake, the weights cut otherwise.
    for tensor, wanted in ((1, range(5)), (4, range(5)), (1, [4])):
        paged_attention.supported = lambda *_, wanted=wanted: wanted.__contains__
        mesh = sharding.make_mesh(1, -1, tensor)
        sampler = Sampler(models.load(names.path("policy"), mesh=mesh), tokenizer, sampling, mesh)
        asked = PROMPTS[rank::2] if sampler.alone else PROMPTS
        rows = [row.response_ids for row in sampler.generate(asked, seed=0)]
        found = {
            "alone": sampler.alone,
            "mesh": list(sampler.mesh.shape.values()),
            "slots": sampler.stats.slots,
            "rows": rows,
        }
        print(json.dumps(found), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

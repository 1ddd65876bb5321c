"""Stage 1: prompts of one iteration → K responses each, shard by shard on disk."""

from collections.abc import Callable, Sequence

from sppo_jax import records
from sppo_jax.errors import BadInput
from sppo_jax.metrics import Metrics
from sppo_jax.records import Prompt, Responses
from sppo_jax.rundir import RunDir, replacing, shard_ranges
from sppo_jax.sampler import Sampler


def respond(
    prompts: Sequence[Prompt],
    sampler: Callable[[], Sampler],
    *,
    run: RunDir,
    iteration: int,
    seed: int,
    shard_prompts: int,
    made_from: dict[str, str],
    metrics: Metrics,
) -> list[Responses]:
    """Responses to every prompt, in order. Shards that are on disk are read, the others made; each is whole or absent.

    `sampler` is called only when a shard is missing.
    """
    ranges = shard_ranges(len(prompts), shard_prompts)
    paths = [run.shard(iteration, "responses", i, len(ranges)) for i in range(len(ranges))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    todo = sum(len(ranges[i]) for i in missing)
    tokens = 0
    if missing:
        with metrics.progress(f"iteration {iteration} respond", todo, "prompts") as advance:
            for i in missing:
                metrics.poll()

                def on_progress(done: int, new_tokens: int) -> None:
                    nonlocal tokens
                    tokens += new_tokens
                    advance(done, tokens=tokens)

                wanted = [prompts[n] for n in ranges[i]]
                rows = sampler().generate(wanted, seed=seed, iteration=iteration, on_progress=on_progress)
                with replacing(paths[i]) as part:
                    records.write(part, Responses, rows, made_from)
    found = [row for path in paths for row in records.read(path, Responses, made_from)]
    if [row.prompt_id for row in found] != [prompt.prompt_id for prompt in prompts]:
        raise BadInput(f"{paths[0].parent}: answers other prompts than asked; delete it and run again")
    reasons = [reason for row in found for reason in row.finish_reason]
    lengths = [len(ids) for row in found for ids in row.response_ids]
    metrics.scalars(
        iteration,
        "respond",
        0,
        responses=len(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        truncated_share=reasons.count("length") / len(reasons),
    )
    return found

"""Recorded lengths trained on by one contender of benchmarks/fit.py, in a process of its own.

python benchmarks/fit_replay.py NAME TASK

NAME is a function of WORKERS, TASK its argument as JSON; the last line printed is what it returns. `trl` runs under the
interpreter of TRL's environment, which has no sppo_jax.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampler_replay import SEED, Trace, Watch, compilations, peak_bytes
from sampler_replay import peaks as peaks  # also a worker

PAD, EOS, FIRST = 0, 2, 5  # token ids; texts are drawn from FIRST on
ETA, RATE = 1000.0, 5e-7  # the defaults of sppo_jax.config.Fit
# The first update's gradients, by the parameters' names in Hugging Face's format.
GRADIENTS = "model.safetensors"


class Work(Watch):
    """A watch that also counts the CPU seconds of this process's threads, which other load on the cores disturbs less."""

    def __enter__(self) -> "Work":
        self._began = time.process_time()
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.cpu = time.process_time() - self._began


@dataclass(frozen=True)
class Data:
    """Pairs of token ids, and the pairs of each update."""

    prompts: list[list[int]]
    responses: list[list[list[int]]]  # for each prompt: chosen, rejected
    order: list[list[int]]

    @staticmethod
    def of(trace: Trace, vocab: int) -> "Data":
        """The trace's prompts, each with the first two of its responses, and not in an order yet."""
        import numpy as np

        rng = np.random.default_rng(SEED + 1)
        responses = [
            [[*rng.integers(FIRST, vocab, n - 1).tolist(), EOS] for n in row[:2]] for row in trace.responses
        ]
        return Data(trace.ids(vocab), responses, [])

    @staticmethod
    def read(task: dict[str, Any]) -> "Data":
        """The task's data: all pairs, or the `first` ones of the first update."""
        found = Data(**json.loads((Path(task["folder"]) / "pairs.json").read_text()))
        if not task["first"]:
            return found
        kept = found.order[0][: task["first"]]
        return Data(
            [found.prompts[i] for i in kept], [found.responses[i] for i in kept], [list(range(len(kept)))]
        )

    def lengths(self, i: int) -> list[int]:
        """Tokens of pair i's two sequences."""
        return [len(self.prompts[i]) + len(ids) for ids in self.responses[i]]

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(sum(self.lengths(i)) for i in range(len(self.prompts)))

    def pairs(self) -> list[Any]:
        """The pairs as sppo_jax.records.Pair, without reference log-probs."""
        from sppo_jax.records import Pair

        return [
            Pair([], [], 1.0, 1.0, 0.0, i, prompt, responses, [1.0, 0.0], 0.5, [ETA / 2, -ETA / 2], [0.0] * 2)
            for i, (prompt, responses) in enumerate(zip(self.prompts, self.responses, strict=True))
        ]


# --- ours -------------------------------------------------------------------------------------------------------------


def batches_of(pairs: list[Any], global_batch: int, packing: Any = None) -> Any:
    """The pairs' updates as sppo_jax makes them."""
    from sppo_jax.training.batches import Batches
    from sppo_jax.training.packing import Packing

    packing = Packing() if packing is None else packing
    return Batches(pairs, global_batch=global_batch, epochs=1, seed=SEED, iteration=1, packing=packing)


def pairs_of(batch: Any) -> list[int]:
    """Indices of an update's pairs, in the order of its microbatches."""
    return [
        index
        for part, pair_G in zip(batch.microbatches, batch.pairs, strict=True)
        for index in pair_G[part.real].tolist()
    ]


def one_device() -> Any:
    """A mesh of one device."""
    import jax

    from sppo_jax import sharding

    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def updates(batches: Iterable[Any], model: Any, programs: Any, mesh: Any) -> Iterator[dict[str, float]]:
    """Train as sppo_jax.fit.fit does, without its files. Yields each update's scalars; donates `model`'s arrays."""
    import jax

    from sppo_jax import compilation
    from sppo_jax.training.update import split

    _, params, frozen = split(model)
    state = programs.first_state(params)
    del params
    for step, batch in enumerate(batches):
        state, scalars = programs.train_step(state, frozen, batch.placed(mesh))
        if step == 1:
            compilation.collect()
        yield {name: float(value) for name, value in jax.device_get(scalars).items()}


def save_gradients(batch: Any, model: Any, programs: Any, mesh: Any, folder: Path) -> None:
    """Write the first update's gradients as a checkpoint."""
    from flax import nnx

    from sppo_jax.models import hf
    from sppo_jax.training.update import split

    _, params, frozen = split(model)
    grads, _ = programs.gradients(params, frozen, batch.placed(mesh))
    folder.mkdir()
    hf.save(nnx.merge(programs.graph, grads, frozen), folder)


def tokens_of(batches: Any, data: Data) -> dict[str, int]:
    """Tokens of all updates' rows, without padding and with it. Fails if an update's pairs are not those of `data`."""
    for step, expected in enumerate(data.order):
        assert sorted(pairs_of(batches[step])) == sorted(expected)
    parts = [part for step in range(len(data.order)) for part in batches[step].microbatches]
    return {
        "real_tokens": sum(int((part.segment > 0).sum()) for part in parts),
        "computed_tokens": sum(part.tokens.size for part in parts),
    }


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """Time reference log-probs, then all updates. Programs compile before that, on two microbatches of a throw-away model."""
    data = Data.read(task)
    with Watch() as imports:
        from sppo_jax import models, pairs, sharding
        from sppo_jax.config import Fit
        from sppo_jax.training import memory, trainer
        from sppo_jax.training.update import make_programs

        compiled = compilations()
    rows, mesh = data.pairs(), one_device()
    settings = Fit(
        loss="sppo_hard", eta=ETA, learning_rate=RATE, warmup=0.0, epochs=1, schedule_epochs=1,
        global_batch=task["global_batch"], max_grad_norm=0.0, remat=task["remat"],
    )  # fmt: skip
    with Watch() as warm:
        model = models.load(Path(task["folder"]) / "model")
        longest = max(len(p.prompt_ids) + sum(map(len, p.response_ids)) for p in rows)
        update = memory.Update(model.architecture, mesh, 4, model.kernel.name, settings.remat, longest)
        packing = update.packing(sharding.memory_limit(mesh))
        packing = dataclasses.replace(packing, pack=task["pack"], shared=task["shared"])
        batches = batches_of(rows, task["global_batch"], packing)
        programs = make_programs(
            model.architecture, model.compute_dtype, mesh, settings, batches.steps_per_epoch
        )
        first = batches[0]
        short = dataclasses.replace(first, microbatches=first.microbatches[:2], pairs=first.pairs[:2])
        for _ in updates([short], model, programs, mesh):
            pass
    del model
    gc.collect()
    with Watch() as load:
        model = models.load(Path(task["folder"]) / "model")
    count = len(compiled)
    with Work() as reference:
        values = trainer.logprobs(model, batches, len(rows), programs, mesh)
    filled = batches_of(pairs.with_reference(rows, values), task["global_batch"], packing)
    if task["gradients"]:
        save_gradients(filled[0], model, programs, mesh, Path(task["gradients"]))
    with Work() as training:
        found = list(updates(filled.from_step(0), model, programs, mesh))
    return {
        "seconds": training.seconds,
        "reference_seconds": reference.seconds,
        "import_seconds": imports.seconds,
        "warm_seconds": warm.seconds,
        "load_seconds": load.seconds,
        "cpu_seconds": training.cpu + reference.cpu,
        "others": max(training.others, reference.others),
        "pairs": len(rows),
        "tokens": data.tokens,
        **tokens_of(filled, data),
        "losses": [one["loss"] for one in found],
        "margins": [one["margin"] for one in found],
        "reference": values.tolist(),
        "programs": count,
        "new_compilations": len(compiled) - count,
        "layout": vars(filled.layout),
        "peak_bytes": peak_bytes(),
    }


# --- TRL --------------------------------------------------------------------------------------------------------------


def words(ids: list[int]) -> str:
    """The text that `tokenizer` turns into `ids`, because TRL accepts only text."""
    return "".join(f"t{i} " if i != EOS else "</s>" for i in ids)


def tokenizer(vocab: int) -> Any:
    """A tokenizer with one word for each id below `vocab`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = {f"t{i}": i for i in range(vocab) if i not in (PAD, EOS)} | {"<pad>": PAD, "</s>": EOS}
    inner = Tokenizer(WordLevel(names, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


def instruments(
    trainer: Any, task: dict[str, Any], training: Work, sizes: dict[str, int]
) -> tuple[type, type]:
    """A DPOTrainer that counts its tokens into `sizes`, and a callback that times `training` and writes gradients."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    class Measured(trainer):
        def _precompute_ref_logps(self, *args: Any) -> Any:
            with Work() as self.reference:
                return super()._precompute_ref_logps(*args)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sizes["computed"] += inputs["input_ids"].numel()
            sizes["real"] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            training.__enter__()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            training.__exit__()

        def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, model: Any, **___: Any) -> None:
            if task["gradients"] and state.global_step == 0:
                Path(task["gradients"]).mkdir()
                grads = {name: p.grad.contiguous() for name, p in model.named_parameters()}
                save_file(grads, Path(task["gradients"]) / GRADIENTS)

    return Measured, Clock


def dpo_settings(task: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's DPOConfig for the same training as ours."""
    return dict(  # noqa: C408
        output_dir=task["output"], loss_type="sppo_hard", beta=1 / ETA, max_length=None,
        precompute_ref_log_probs=True, gradient_checkpointing=task["checkpointing"],
        per_device_train_batch_size=task["per_device"],
        gradient_accumulation_steps=task["global_batch"] // task["per_device"], num_train_epochs=1,
        train_sampling_strategy="sequential", optim="rmsprop", optim_args="alpha=0.99,eps=1e-8",
        learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0,
        use_cpu=True, bf16=False, dataloader_pin_memory=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=SEED,
    )  # fmt: skip


def trl(task: dict[str, Any]) -> dict[str, Any]:
    """DPOTrainer with its reference log-probs computed once, over the same updates."""
    with Watch() as imports:
        import torch
        import transformers
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl import DPOConfig, DPOTrainer, __version__

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(task["threads"])
    data = Data.read(task)
    order = [[*step] for step in data.order]
    if task["by_length"]:
        order = [sorted(step, key=lambda i: (max(data.lengths(i)), i)) for step in order]
    in_order = [i for step in order for i in step]
    training, sizes = Work(), {"computed": 0, "real": 0}
    measured, clock = instruments(DPOTrainer, task, training, sizes)
    with Watch() as load:
        model = AutoModelForCausalLM.from_pretrained(Path(task["folder"]) / "model", dtype=torch.float32)
    texts = [
        {"prompt": words(data.prompts[i]), **dict(zip(("chosen", "rejected"), map(words, data.responses[i]), strict=True))}
        for i in in_order
    ]  # fmt: skip
    trainer = measured(
        model, args=DPOConfig(**dpo_settings(task)), train_dataset=Dataset.from_list(texts), callbacks=[clock()],
        processing_class=tokenizer(model.config.vocab_size),
    )  # fmt: skip
    for row, i in zip(trainer.train_dataset, in_order, strict=True):
        assert row["prompt_ids"] == data.prompts[i]
        assert [row["chosen_ids"], row["rejected_ids"]] == data.responses[i]
    trainer.train()
    assert sizes["real"] == data.tokens
    logged = [one for one in trainer.state.log_history if "loss" in one]
    reference = dict(
        zip(
            in_order,
            ([row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in trainer.train_dataset),
            strict=True,
        )
    )
    return {
        "seconds": training.seconds,
        "reference_seconds": trainer.reference.seconds,
        "import_seconds": imports.seconds,
        "warm_seconds": 0.0,
        "load_seconds": load.seconds,
        "cpu_seconds": training.cpu + trainer.reference.cpu,
        "others": max(training.others, trainer.reference.others),
        "pairs": len(in_order),
        "tokens": data.tokens,
        "real_tokens": sizes["real"],
        "computed_tokens": sizes["computed"],
        "losses": [one["loss"] for one in logged],
        "margins": [one["rewards/margins"] * ETA for one in logged],
        "reference": [reference[i] for i in range(len(in_order))],
        "peak_bytes": peak_bytes(),
        "versions": {"trl": __version__, "TRL's transformers": transformers.__version__, "TRL's torch": torch.__version__},
    }  # fmt: skip


WORKERS = {"ours": ours, "trl": trl, "peaks": peaks}


def main() -> None:
    """Run one worker and print its result."""
    name, task = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    print("\n" + json.dumps(WORKERS[name](task)))


if __name__ == "__main__":
    main()

"""What a run writes: the files of OUT, and the fields of metrics.jsonl. `python -m sppo_jax.run.layout` prints docs/files.md."""

from dataclasses import dataclass
from pathlib import Path

from sppo_jax.run.directory import RunDir

RUN, T = RunDir("OUT"), 1  # iteration 1 stands for every iteration
PAGE = """# Files of a run

Generated from `sppo_jax/run/layout.py` by `make files-docs`.

A file that exists is complete: it is written under a hidden name, and gets its own when all of it is on the disk. So a run that was
stopped goes on at the first file that is missing. Parquet files name what they were made from (weights, judge, prompts, configuration), and
those of other inputs are refused. Read them with `pyarrow.parquet.read_table`, or `pandas.read_parquet`.

## OUT

Iteration 0 is the base model; `iter_1` stands for every iteration.

| file | what it holds |
|---|---|
{files}

## metrics.jsonl

One JSON object in each line. All of them have `iteration` (from 1), `stage`, `step` and `time` (seconds since 1970). A run that was
stopped may write a line again: of equal (iteration, stage, step) the last one counts. A number that is not finite is null.
TensorBoard's files under `OUT/tensorboard/` have the same numbers.

| stage | field | unit | meaning |
|---|---|---|---|
{fields}
"""


@dataclass(frozen=True)
class Field:
    """A number in a line of metrics.jsonl. `when`: the condition under which it is written; empty: always."""

    stage: str
    name: str
    unit: str
    meaning: str
    when: str = ""


def _shard(stage: str) -> Path:
    return RUN.shard(T, stage, 0, 8)


# Every file or folder that a run leaves, by its path below OUT.
FILES: list[tuple[Path, str]] = [
    (RUN.config, "the configuration with every knob; `--config` reads it"),
    (
        RUN.manifest,
        "versions, devices, seed, commits of the hub, sha256 of every input, counts of prompts read, left out and kept",
    ),
    (RUN.metrics, "the numbers of each stage, below"),
    (RUN.tensorboard, "the same numbers for TensorBoard"),
    (RUN.report, "the report, with pictures: one file, written again after each iteration"),
    (RUN.profile, "xprof's trace of some updates, with `log.profile`"),
    (
        RUN.evaluation(0),
        "the base model against itself: win rates by the judge and the oracle, lengths of its responses",
    ),
    (RUN.heldout(0, "responses"), "the base model's responses to the held-out prompts"),
    (
        _shard("responses"),
        "`prompt_id`, `prompt`, `prompt_ids`; K each of `response_ids`, `responses`, `finish_reason` (`stop`, `length`), `logprobs` "
        "(sums over the response's tokens, in nats, at temperature 1)",
    ),
    (
        _shard("preferences"),
        "`prompt_id`, `logits` [K, K], `probability` [K, K] (P(i > j)), `win_rate` [K], `estimator`",
    ),
    (
        RUN.pairs(T),
        "what is trained on: `prompt_ids`, and best to worst `response_ids`, `win_rate`, `baseline`, `target` (nats), `ref_logprob` (nats), with "
        "`judge.target: score` also `score` (nats), with `fit.anchor` `base_logprob` (nats); beside "
        "them the official code's columns `chosen`, `rejected`, `chosen_probs`, `chosen_probs_win`, `chosen_probs_lose`",
    ),
    (RUN.root / f"iter_{T}" / "checkpoints", "parameters, optimizer state and step, as orbax writes them"),
    (RUN.export(T), "the new policy, as `transformers` loads it, with a model card"),
    (RUN.adapter(T), "its adapters, as PEFT loads them, with `model.lora_rank`"),
    (RUN.heldout(T, "responses"), "the new policy's responses to the held-out prompts"),
    (
        RUN.heldout(T, "probe"),
        "judged responses of its reference to held-out prompts: how far their log-probs moved",
    ),
    (
        RUN.evaluation(T),
        "win rates against the base and the previous policy (mean, standard error, each prompt's), lengths, log-ratios",
    ),
]

JUDGED = [
    ("cycle_share", "share", "prompts in which three responses beat each other in a ring"),
    ("tie_share", "share", "pairs whose probability is 1/2"),
    ("position_bias", "nats", "mean of L_ij + L_ji: twice the advantage of the response that is shown first"),
    (
        "length_correlation",
        "-1 to 1",
        "correlation of win rate and length within prompts; 0 where one never varies",
    ),
    (
        "longest_share",
        "share",
        "prompts whose best response is their longest one; by chance it would be 1/K",
    ),
    ("entropy", "nats", "mean entropy of P(i > j): 0 is sure of every pair, ln 2 = 0.69 knows nothing"),
]
SAMPLED = "responses are sampled, not given"
ORACLE = "`eval.oracle` is named"
RANKED = "some held-out prompt has a preferred response"
PARTS = {
    "sampling": "responses of the training prompts, with the judging that goes on beside it",
    "judging": "judging after the last response",
    "scoring": "log-probs of the reference, and of the base with `fit.anchor`",
    "training": "updates and checkpoints",
    "exporting": "the Hugging Face directory",
    "evaluating": "held-out responses and win rates",
    "total": "the whole iteration",
}

FIELDS: list[Field] = [
    Field("respond", "responses", "count", "responses of the iteration, all prompts together"),
    Field("respond", "mean_tokens", "tokens", "mean length of a response"),
    Field("respond", "truncated_share", "share", "responses cut at `sampling.max_new_tokens`"),
    Field(
        "respond", "seconds", "s", "wall time of the sampling in the last start that sampled; judging beside it counts", SAMPLED
    ),
    Field("respond", "tokens_per_second", "1/s", "new tokens of all processes in a second", SAMPLED),
    Field("respond", "slot_efficiency", "share", "slots in which a response was being decoded, of all", SAMPLED),
    *(Field("judge_shard", *of) for of in JUDGED),
    Field("judge_shard", "cut_prompts", "count", "prompts of which the judge read the beginning only"),
    Field("judge_shard", "cut_responses", "count", "responses of which the judge read the beginning only"),
    Field("judge_shard", "pairs_per_second", "1/s", "ordered pairs judged in a second; `step` is the shard's number"),
    *(Field("judge", name, unit, f"{meaning}, over all prompts") for name, unit, meaning in JUDGED),
    Field("pairs", "kept", "count", "prompts that are trained on"),
    Field("pairs", "no_signal", "count", "prompts left out: all win rates are equal", "there are some"),
    Field("pairs", "empty_chosen", "count", "prompts left out: the best response is empty", "there are some"),
    Field("pairs", "responses", "count", "responses that are trained on"),
    Field("pairs", "truncated_responses", "count", "of these, cut at `sampling.max_new_tokens`"),
    Field("pairs", "largest_target", "nats", "largest absolute target of a response that is trained on"),
    Field("sampler_gap", "mean", "nats", "mean difference of the sampler's and training's log-probs, per token", SAMPLED),
    Field("sampler_gap", "rms", "nats", "its root mean square", SAMPLED),
    Field("sampler_gap", "max", "nats", "its largest value", SAMPLED),
    Field("fit", "loss", "nats²", "the loss; `step` is the update, from 0. `fit.loss` dpo: in nats"),
    Field("fit", "log_ratio_chosen", "nats", "mean log pi_theta - log pi_t of the best responses of the batch"),
    Field("fit", "log_ratio_rejected", "nats", "of the worst responses"),
    Field("fit", "logprob_chosen", "nats", "mean log pi_theta of the best responses of the batch"),
    Field("fit", "logprob_rejected", "nats", "of the worst responses"),
    Field("fit", "margin", "nats", "mean difference of the two"),
    Field("fit", "accuracy", "share", "prompts whose margin is above 0"),
    Field("fit", "max_log_ratio", "nats", "largest absolute log-ratio of the batch; exactly 0 at step 0"),
    Field("fit", "grad_norm", "nats²", "Euclidean norm of the gradient of all trained parameters"),
    Field("fit", "learning_rate", "", "rate of this update"),
    Field("fit", "skipped", "", "1: loss or gradient was not finite, and nothing changed", "an update is skipped"),
    Field("evaluate", "win_rate_judge_base", "share", "mean P(new policy's response > the base's) by the run's judge"),
    Field("evaluate", "win_rate_judge_previous", "share", "the same against the previous policy"),
    Field("evaluate", "win_rate_oracle_base", "share", "the same by the oracle, against the base", ORACLE),
    Field("evaluate", "win_rate_oracle_previous", "share", "the same by the oracle, against the previous policy", ORACLE),
    Field("evaluate", "win_rate_judge_base_stderr", "share", "standard error of the win rate"),
    Field("evaluate", "win_rate_judge_previous_stderr", "share", "standard error of the win rate"),
    Field("evaluate", "win_rate_oracle_base_stderr", "share", "standard error of the win rate", ORACLE),
    Field("evaluate", "win_rate_oracle_previous_stderr", "share", "standard error of the win rate", ORACLE),
    Field("evaluate", "winners", "nats", "mean log-ratio of the best responses of the probe", RANKED),
    Field("evaluate", "winners_stderr", "nats", "its standard error", RANKED),
    Field("evaluate", "losers", "nats", "mean log-ratio of the worst responses of the probe", RANKED),
    Field("evaluate", "losers_stderr", "nats", "its standard error", RANKED),
    Field("evaluate", "kl_per_token", "nats", "estimate of KL(pi_t || pi_theta) per token, from the probe"),
    Field("evaluate", "tokens", "tokens", "mean length of a held-out response"),
    Field("evaluate", "tokens_before", "tokens", "mean length of a held-out response of the previous policy"),
    Field("evaluate", "words", "words", "mean length of a held-out response"),
    Field("evaluate", "prompts", "", "held-out prompts that were answered"),
    Field("evaluate", "truncated_share", "share", "held-out responses cut at `sampling.max_new_tokens`"),
    *(Field("seconds", name, "s", f"wall time of all starts: {meaning}") for name, meaning in PARTS.items()),
]  # fmt: skip


def markdown() -> str:
    """The text of docs/files.md."""
    files = [
        f"| `{path.relative_to(RUN.root.parent)}{'' if path.suffix else '/'}` | {text} |"
        for path, text in FILES
    ]
    fields = [
        f"| {field.stage} | `{field.name}` | {field.unit} | {field.meaning}"
        f"{f' (only if {field.when})' if field.when else ''} |"
        for field in FIELDS
    ]
    return PAGE.format(files="\n".join(files), fields="\n".join(fields))


if __name__ == "__main__":
    print(markdown(), end="")

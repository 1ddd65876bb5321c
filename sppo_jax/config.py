"""The configuration: every knob with its default, range and meaning, in frozen dataclasses.

`sppo_jax.config_file` reads and writes configurations.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from sppo_jax.losses import LOSSES

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]

EMBEDDED = "embedded:"  # prefix of paths that name the small default inside the package
INTRODUCTION = """Generated from the dataclasses in `sppo_jax/config.py` by `make config-docs`.
Give one or more `--config FILE`; later files override earlier ones, and `--section.key value` flags override all files.
Numbers are decimal and, without another bound, below 2147483648. `~` is your home directory in every path."""
LARGEST = 2**31  # every number without a bound of its own lies below this
MOST_LAYERS = 10_000  # of a network; a config.json with more is damaged, and would fill the memory with names
INFINITE = 2.0**128 - 2.0**103  # this and more is infinite in float32, in which nearly everything is computed


@dataclass(frozen=True)
class Range:
    """The numbers that a knob accepts: from `low` or above `above`, to `high` or below `below`."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    # The code that reads the knob raises numbers that are 0 in float32 to the smallest that is not.
    clamped: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the number is accepted. NaN never is."""
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and value < (self.below or LARGEST)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(
            f"{name} {number}" for name, number in bounds.items() if number not in (None, INFINITE)
        )

    def whole(self) -> str:
        """Both bounds in words, also the upper one that every number has."""
        if self.high is not None or self.below not in (None, INFINITE):
            return str(self)
        return f"{self} and below {LARGEST if self.below is None else '3.4e38'}"


class Knob(NamedTuple):
    """One line of the configuration's documentation."""

    key: str  # "section.name", or the name alone outside of sections
    kind: str  # "int", or "best_worst|all"
    default: Any
    help: str
    range: Range | None


def knob(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its documentation and, by `bounds`, its Range; --help and configs/README.md show both."""
    metadata = {"help": help, "range": Range(**bounds) if bounds else None}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    path: str = knob(
        "embedded:policy",
        "base policy: a Hugging Face directory, a name on the hub (owner/repo[@revision]), or embedded:policy",
    )
    lora_rank: int = knob(
        0, "rank of the adapters that are trained beside frozen weights; 0: train all weights", low=0
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto",
        "dtype of the matrix products; auto: float32 on CPUs, bfloat16 elsewhere. Trained weights stay float32",
    )
    attention: Literal["auto", "xla", "splash", "cudnn", "triton", "blocked"] = knob(
        "auto",
        "attention kernel; auto: splash and ragged paged attention on TPUs, cuDNN on GPUs for models that it supports, blocked on CPUs",
    )
    template: dict[str, Any] = knob(  # noqa: RUF009  (each configuration has a new one)
        {},
        "options of the chat template, such as {enable_thinking: false}: names that it reads, with truths, numbers or texts",
    )


@dataclass(frozen=True)
class Mesh:
    data: int = knob(1, "replicas of the model; -1: all devices that the other two axes leave")
    fsdp: int = knob(
        -1, "devices that share parameters and batch; -1: all devices that the other two axes leave"
    )
    tensor: int = knob(1, "devices that share heads, feed-forward and vocabulary")


@dataclass(frozen=True)
class Distributed:
    coordinator: str = knob(
        "",
        "HOST:PORT at which process 0 of several is found. Empty: found by itself on TPU pods, GKE, SLURM and Open MPI; else "
        "there is one process",
    )
    process_id: int = knob(-1, "number of this process, from 0; -1: found with the coordinator", low=-1)
    num_processes: int = knob(0, "number of all processes; 0: found with the coordinator", low=0)
    initialization_timeout: int = knob(900, "seconds in which all processes have to come", low=1)
    heartbeat_timeout: int = knob(
        100, "seconds without a sign of life after which a process is lost, and the others end", low=2
    )


@dataclass(frozen=True)
class Prompts:
    source: str = knob(
        "",
        "training prompts: tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH; {iteration} here or in the split names "
        "one set per iteration; without it one pool is divided. Empty: the embedded ones, beside the embedded policy only",
    )
    split: str = knob("train", "split of a tfds or hf source; {iteration}, a+b and train[:100] are allowed")
    heldout: str = knob(
        "",
        "prompts for evaluation only, in the notation of prompts.source. Empty: the embedded ones beside embedded training "
        "prompts, else a share of your training prompts is held out",
    )
    heldout_split: str = knob(
        "test", "split of a tfds or hf source of held-out prompts; test_1+test_2 joins two"
    )
    column: str = knob("prompt", "column that holds the instruction, or a conversation")
    turns: Literal["last", "first"] = knob(
        "last",
        "of a conversation, last: all of it up to the user's last turn; first: the user's first turn alone, if it begins with it",
    )
    per_iteration: int = knob(128, "largest number of training prompts in each iteration", low=1)
    max_length: int = knob(
        512,
        "largest number of tokens of a prompt with its chat template; longer prompts are skipped and counted",
        low=1,
    )


@dataclass(frozen=True)
class Sampling:
    responses: int = knob(5, "K, responses per prompt; a preference needs two", low=2)
    temperature: float = knob(1.0, "temperature of sampling; 0: greedy", low=0, below=INFINITE, clamped=True)
    top_p: float = knob(1.0, "nucleus mass", above=0, high=1, clamped=True)
    top_k: int = knob(0, "sample from the k most likely tokens only, before top_p; 0: from all tokens", low=0)
    max_new_tokens: int = knob(
        64, "largest number of tokens of a response; one cut there has finish_reason length", low=1
    )
    slots: int = knob(320, "responses decoded at once, over all devices of a process", low=1)
    cache_tokens: int = knob(
        0,
        "tokens whose keys and values fit into the cache while sampling, over all devices of a process; 0: as many as slots can "
        "need, or as many as the memory holds",
        low=0,
    )
    quantize: Literal["none", "int8"] = knob(
        "none",
        "int8: the sampler's copy of the weights in 8 bits, also its keys and values where XLA's attention reads them (not on TPUs)",
    )
    shard_prompts: int = knob(64, "prompts per shard file of responses and of preferences", low=1)


@dataclass(frozen=True)
class Judge:
    backend: str = knob(
        "torch",
        "torch: PairRM in a process of its own; jax: PairRM on the mesh; llm_blender: the original package, for comparison; "
        "module:attribute: a function of your own that returns a judge",
    )
    path: str = knob(
        "",
        "PairRM in either published layout: a directory, a name on the hub (owner/repo[@revision]), or embedded:pairrm. "
        "Empty: embedded:pairrm, beside the embedded policy only",
    )
    python: str = knob("", "Python interpreter that has llm-blender, for judge.backend=llm_blender")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "dtype of PairRM's matrix products; auto: float32 on CPUs, bfloat16 elsewhere"
    )
    source_tokens: int = knob(
        0, "largest number of tokens that PairRM reads of a prompt; 0: the checkpoint's number, or 1224"
    )
    candidate_tokens: int = knob(
        0, "tokens of each response that fit beside the longest prompt; 0: the checkpoint's number, or 412"
    )
    total_tokens: int = knob(
        0,
        "largest number of tokens of a prompt and two responses, which share equally what the prompt leaves; 0: source + 2 candidates",
    )
    estimator: Literal["pairwise", "pairwise_loo", "score"] = knob(
        "pairwise", "how logits become win rates; score is the official code's Bradley-Terry projection"
    )
    sharpness: float = knob(
        1.0, "factor of the pairwise logit; 2 sums the two orders instead of averaging them", above=0
    )
    target: Literal["probability", "score"] = knob(
        "probability",
        "what is regressed on and ranks responses: the win rate, or the mean of the judge's scores in nats, without a bound "
        "(docs/losses.md)",
    )
    prompt: Literal["raw", "chat"] = knob(
        "raw", "raw: the judge reads the instruction; chat: the instruction in its chat template"
    )
    strip: Literal["auto", "think", "none"] = knob(
        "auto",
        "think: judges do not read <think>…</think> of responses and earlier turns; auto: think, if the policy's template "
        "knows thoughts. Training keeps them",
    )


@dataclass(frozen=True)
class Pairs:
    select: Literal["best_worst", "all"] = knob("best_worst", "train on the best and worst of K, or on all K")
    source: str = knob(
        "",
        "empty: sample and judge; parquet:PATH, jsonl:PATH or hf:NAME, {iteration} allowed: train on the official code's "
        "pairs instead",
    )
    split: str = knob("train", "split of an hf source, {iteration} allowed")


@dataclass(frozen=True)
class Responses:
    source: str = knob(
        "",
        "empty: sample; tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH, {iteration} allowed: judge and train on responses made "
        "elsewhere instead. Its rows are the training prompts, in prompts.column",
    )
    split: str = knob("train", "split of a tfds or hf source, {iteration} allowed")
    column: str = knob("responses", "column of a prompt's list of responses; the first K are taken")


@dataclass(frozen=True)
class Fit:
    loss: LossName = knob(  # noqa: RUF009  (a type that ruff cannot see through)
        "sppo",
        "the loss, where l_w and l_l are log pi_theta/pi_t of winner and loser; "
        + "; ".join(f"{name}: {loss.equation}" for name, loss in LOSSES.items()),
    )
    eta: float = knob(1000.0, "step size of the game; 1/beta of dpo, ipo and difference", above=0)
    anchor: float = knob(
        0.0,
        "rho, share of the base pi_0 in the loss's reference (1-rho) log pi_t + rho log pi_0",
        low=0,
        high=1,
    )
    baseline: float | Literal["log_partition"] = knob(
        0.5, "win rate, from 0 to 1, whose target is 0; log_partition: log mean exp(eta P)/eta of each prompt"
    )
    learning_rate: float = knob(5e-7, "peak of the linear schedule", above=0)
    warmup: float = knob(0.1, "share of the schedule's steps in which the rate rises from 0", low=0, below=1)
    epochs: int = knob(1, "passes over the pairs in each iteration", low=1)
    schedule_epochs: int = knob(
        1, "epochs of the whole schedule; more than fit.epochs: it is stopped early", low=1
    )
    global_batch: int = knob(64, "prompts per update, over all devices", low=1)
    max_grad_norm: float = knob(
        0.0, "largest global norm of a gradient; 0: no clipping", low=0, below=INFINITE
    )
    remat: Literal["layer", "attention"] = knob(
        "layer",
        "layer: the backward pass computes each layer again; attention: all but its attention, for more memory",
    )
    checkpoint_every: int = knob(50, "updates between checkpoints", low=1)


@dataclass(frozen=True)
class Eval:
    prompts: int = knob(500, "largest number of held-out prompts for win rates", low=1)
    probe_prompts: int = knob(100, "held-out prompts that get K responses, for log-ratios", low=1)
    oracle: str = knob("", "a second judge, for evaluation alone: module:attribute; empty: none")


@dataclass(frozen=True)
class Log:
    every: int = knob(1, "updates between lines of metrics.jsonl", low=1)
    to: list[Literal["tensorboard", "wandb", "trackio"]] = knob(  # noqa: RUF009  (as model.template)
        ["tensorboard"],
        "where curves and sample texts go beside metrics.jsonl, as [tensorboard, wandb]; []: nowhere (docs/running.md)",
    )
    profile: int = knob(
        0,
        "updates of the first iteration that are recorded for xprof in OUT/profile (docs/performance.md)",
        low=0,
    )


@dataclass(frozen=True)
class Config:
    out: str = knob("runs/sppo", "the run directory, or a folder in a bucket, as gs://BUCKET/RUN")
    seed: int = knob(42, "seed of sampling and of the order of the data", low=0, below=2**32)
    iterations: int = knob(3, "iterations of self-play", low=1)
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: Distributed = field(default_factory=Distributed)
    prompts: Prompts = field(default_factory=Prompts)
    sampling: Sampling = field(default_factory=Sampling)
    judge: Judge = field(default_factory=Judge)
    pairs: Pairs = field(default_factory=Pairs)
    responses: Responses = field(default_factory=Responses)
    fit: Fit = field(default_factory=Fit)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)


def flat(config: Config) -> dict[str, Any]:
    """{"section.key": value} of every knob."""
    knobs: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        knobs |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return knobs


def knobs() -> list[Knob]:
    """Every knob, in order."""
    found = []
    for top in dataclasses.fields(Config):
        section = dataclasses.is_dataclass(top.type)
        for f in dataclasses.fields(top.type) if section else (top,):  # type: ignore[arg-type]
            key = f"{top.name}.{f.name}" if section else f.name
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            found.append(Knob(key, type_name(f.type), default, f.metadata["help"], f.metadata["range"]))
    return found


def kinds() -> dict[str, Any]:
    """{"section.key": type} of every knob, in order."""
    found: dict[str, Any] = {}
    for top in dataclasses.fields(Config):
        if dataclasses.is_dataclass(top.type):
            found |= {f"{top.name}.{f.name}": f.type for f in dataclasses.fields(top.type)}
        else:
            found[top.name] = top.type
    return found


def is_mapping(kind: Any) -> bool:
    """Whether a knob of this type holds {name: value}."""
    return get_origin(kind) is dict


def is_list(kind: Any) -> bool:
    """Whether a knob of this type holds a list of names."""
    return get_origin(kind) is list


def type_name(kind: Any) -> str:
    """A field's type as documentation shows it: "int", "layer|attention", "float|log_partition"."""
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind))
    if is_mapping(kind):
        return "mapping"
    if is_list(kind):
        return f"list of {type_name(get_args(kind)[0])}"
    if get_args(kind):
        return "|".join(type_name(a) for a in get_args(kind))
    return getattr(kind, "__name__", str(kind))


def markdown() -> str:
    """The text of configs/README.md: every knob with its type, default, range and meaning."""
    lines = ["# Configuration", "", INTRODUCTION, ""]
    for f in dataclasses.fields(Config):
        rows = [row for row in knobs() if row.key.split(".")[0] == f.name]
        if dataclasses.is_dataclass(f.type):
            lines += ["", f"## {f.name}", ""]
        if dataclasses.is_dataclass(f.type) or f.name == "out":
            lines += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
        for key, kind, default, text, accepted in rows:
            cells = [f"`{key}`", kind.replace("|", " | "), f"`{default!r}`", str(accepted or ""), text]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")

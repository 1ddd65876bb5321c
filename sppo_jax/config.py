"""The configuration: frozen dataclasses, the sole home of defaults, and how they are loaded and dumped."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import draccus
import yaml

from sppo_jax.errors import BadInput
from sppo_jax.losses import LOSSES

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]

EMBEDDED = "embedded:"  # prefix of paths that name the small default inside the package


def knob(default: Any, help: str) -> Any:
    """A configuration field with its line of documentation (shown by --help and configs/README.md)."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Model:
    path: str = knob(
        "embedded:policy",
        "base policy: a Hugging Face directory, a name on the hub (owner/repo[@revision]), or embedded:policy",
    )
    lora_rank: int = knob(0, "train adapters of this rank beside frozen weights; 0: train all weights")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto",
        "dtype of the matrix products; auto: float32 on CPUs, bfloat16 elsewhere. Masters stay float32",
    )
    attention: Literal["auto", "xla", "splash", "cudnn", "blocked"] = knob(
        "auto",
        "attention kernel; auto: splash and ragged paged attention on TPUs, cuDNN on GPUs where it serves, blocked on CPUs",
    )


@dataclass(frozen=True)
class Mesh:
    data: int = knob(1, "replicas of the model; -1: whatever the other two axes leave of the devices")
    fsdp: int = knob(-1, "devices that share parameters and batch; -1 as above")
    tensor: int = knob(1, "devices that share heads, feed-forward and vocabulary")


@dataclass(frozen=True)
class Prompts:
    source: str = knob(
        "embedded:prompts/train_{iteration}.jsonl",
        "training prompts: tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH; {iteration} here or in the split names "
        "a set per iteration, else one pool is divided",
    )
    split: str = knob("train", "split of a tfds or hf source, {iteration} allowed; a+b and train[:100] work")
    heldout: str = knob("embedded:prompts/heldout.jsonl", "prompts for evaluation only, named as source is")
    heldout_split: str = knob("test", "split of a tfds or hf heldout; test_1+test_2 joins two")
    column: str = knob(
        "prompt", "the field that holds the instruction, or a conversation that begins with it"
    )
    per_iteration: int = knob(128, "training prompts in each iteration, at most")
    max_length: int = knob(
        512, "tokens of a prompt with its template; longer prompts are skipped and counted"
    )


@dataclass(frozen=True)
class Sampling:
    responses: int = knob(5, "K, responses per prompt")
    temperature: float = knob(1.0, "0: greedy")
    top_p: float = knob(1.0, "nucleus mass, in (0, 1]")
    top_k: int = knob(0, "sample from the k most likely tokens only, before top_p; 0: from all")
    max_new_tokens: int = knob(64, "a response that reaches this length ends with finish_reason length")
    slots: int = knob(320, "responses decoded at once, over all devices of a process")
    cache_tokens: int = knob(
        0,
        "tokens whose keys and values are kept while sampling, over all devices of a process; 0: what slots can need, or what fits",
    )
    quantize: Literal["none", "int8"] = knob(
        "none",
        "int8: the sampler's copy of the weights in 8 bits, and its keys and values where XLA reads them (not on TPUs)",
    )
    shard_prompts: int = knob(64, "prompts per shard file of responses and of preferences")


@dataclass(frozen=True)
class Judge:
    backend: str = knob(
        "torch",
        "torch: PairRM in a process of its own; jax: PairRM on the mesh; llm_blender: the original package, to compare; "
        "module:attribute: a factory of your own",
    )
    path: str = knob(
        "embedded:pairrm",
        "PairRM in either published layout: a directory, a name on the hub (owner/repo[@revision]), or embedded:pairrm",
    )
    python: str = knob("", "interpreter that has llm-blender, for that backend")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "dtype of PairRM's matrix products; auto: float32 on CPUs, bfloat16 elsewhere"
    )
    source_tokens: int = knob(0, "most that PairRM reads of a prompt; 0: as its checkpoint says, else 1224")
    candidate_tokens: int = knob(
        0, "what each response gets beside the longest prompt; 0: as its checkpoint says, else 412"
    )
    total_tokens: int = knob(
        0, "most of a prompt and two responses; what the prompt leaves is halved; 0: source + 2 candidates"
    )
    estimator: Literal["pairwise", "pairwise_loo", "score"] = knob(
        "pairwise", "how logits become win rates; score is the official code's Bradley-Terry projection"
    )
    sharpness: float = knob(1.0, "multiplies the pairwise logit; 2 sums the two orders instead of averaging")
    prompt: Literal["raw", "chat"] = knob(
        "raw", "what the judge reads: the instruction, or its chat template"
    )


@dataclass(frozen=True)
class Pairs:
    select: Literal["best_worst", "all"] = knob("best_worst", "train on the best and worst of K, or on all K")
    source: str = knob(
        "",
        "empty: play the game; parquet:PATH, jsonl:PATH or hf:NAME, {iteration} allowed: train on the official code's "
        "pairs instead of sampling and judging",
    )
    split: str = knob("train", "split of an hf source, {iteration} allowed")


@dataclass(frozen=True)
class Fit:
    loss: LossName = knob(  # noqa: RUF009  (a type that ruff cannot see through)
        "sppo",
        "the loss, where l_w and l_l are log pi_theta/pi_t of winner and loser; "
        + "; ".join(f"{name}: {loss.equation}" for name, loss in LOSSES.items()),
    )
    eta: float = knob(1000.0, "step size of the game; 1/beta of dpo and ipo")
    baseline: float | Literal["log_partition"] = knob(
        0.5, "win rate that leaves a response alone; log_partition: log mean exp(eta P)/eta of each prompt"
    )
    learning_rate: float = knob(5e-7, "peak of the linear schedule")
    warmup: float = knob(0.1, "share of the schedule's steps spent rising from 0")
    epochs: int = knob(1, "passes over the pairs in each iteration")
    schedule_epochs: int = knob(1, "epochs the schedule is laid out for; more than epochs: stopped early")
    global_batch: int = knob(64, "prompts per update, over all devices")
    max_grad_norm: float = knob(0.0, "clip the gradient's global norm; 0: never")
    remat: Literal["layer", "attention"] = knob(
        "layer",
        "the backward pass computes each layer again: all of it, or all but attention, which takes memory",
    )
    checkpoint_every: int = knob(50, "updates between checkpoints")


@dataclass(frozen=True)
class Eval:
    prompts: int = knob(500, "held-out prompts for win rates, at most")
    probe_prompts: int = knob(100, "of these, how many get K responses for held-out log-ratios")
    oracle: str = knob("", "a second judge for evaluation alone, module:attribute; empty: none")


@dataclass(frozen=True)
class Log:
    every: int = knob(1, "updates between lines in metrics.jsonl")
    profile: int = knob(
        0, "updates of the first iteration to record for xprof, in OUT/profile (docs/performance.md)"
    )


@dataclass(frozen=True)
class Config:
    out: str = knob("runs/sppo", "the run directory")
    seed: int = knob(42, "of sampling and of the data order")
    iterations: int = knob(3, "iterations of self-play")
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    prompts: Prompts = field(default_factory=Prompts)
    sampling: Sampling = field(default_factory=Sampling)
    judge: Judge = field(default_factory=Judge)
    pairs: Pairs = field(default_factory=Pairs)
    fit: Fit = field(default_factory=Fit)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)


# What may differ between a run and its resumption: it moves work about but not its results.
FREE_TO_CHANGE = (
    "out",
    "iterations",
    "mesh.",
    "log.",
    "fit.checkpoint_every",
    "fit.remat",
    "model.attention",
    "sampling.slots",
    "sampling.cache_tokens",
    "judge.python",
)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Defaults, then each YAML file in turn, then `--section.key value` overrides.

    Raises BadInput that names the file, the key and the nearest valid key.
    """
    raw: dict[str, Any] = {}
    for file in files:
        _merge(raw, _read_yaml(Path(file)))
    for key, value in _parse_overrides(overrides):
        *sections, leaf = key.split(".")
        nested: dict[str, Any] = {leaf: value}
        for section in reversed(sections):
            nested = {section: nested}
        _check_keys(nested, f"--{key}")
        _merge(raw, nested)
    try:
        config = draccus.decode(Config, raw)
    except Exception as error:  # draccus raises several kinds; its first line names key, value and type
        first, *details = str(error).splitlines()
        tried = f" {' or '.join(d.strip() for d in details)}" if first.endswith(":") else ""
        raise BadInput(f"configuration: {first}{tried}") from None
    validate(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(draccus.encode(config), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """{"section.key": value} of every knob."""
    knobs: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        knobs |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return knobs


def knobs() -> list[tuple[str, str, Any, str]]:
    """(key, type, default, help) of every knob, in order."""
    rows = []
    for top in dataclasses.fields(Config):
        section = dataclasses.is_dataclass(top.type)
        for f in dataclasses.fields(top.type) if section else (top,):  # type: ignore[arg-type]
            key = f"{top.name}.{f.name}" if section else f.name
            rows.append((key, _type_name(f.type), f.default, f.metadata["help"]))
    return rows


def changed_keys(old: Config, new: Config) -> list[str]:
    """Knobs that differ and that change results, for refusing a run directory of another configuration."""
    before, after = flat(old), flat(new)
    return [k for k in after if before[k] != after[k] and not k.startswith(FREE_TO_CHANGE)]


def validate(config: Config) -> None:
    """Raise BadInput where values make no sense alone or together."""
    positive = [
        "iterations",
        "prompts.per_iteration",
        "prompts.max_length",
        "sampling.max_new_tokens",
        "sampling.slots",
        "sampling.shard_prompts",
        "fit.epochs",
        "fit.schedule_epochs",
        "fit.global_batch",
        "fit.checkpoint_every",
        "fit.eta",
        "fit.learning_rate",
        "judge.sharpness",
        "eval.prompts",
        "eval.probe_prompts",
        "log.every",
    ]
    values = flat(config)
    for key in positive:
        if not 0 < values[key] < 2**31:
            raise BadInput(f"{key}={values[key]} must be a number above 0 (and below 2**31)")
    if not 0 <= config.log.profile < 2**31:
        raise BadInput(f"log.profile={config.log.profile} must be 0 (never) or a number of updates")
    sampling, fit = config.sampling, config.fit
    for key in ("top_k", "cache_tokens"):
        if not 0 <= getattr(sampling, key) < 2**31:
            raise BadInput(f"sampling.{key}={getattr(sampling, key)} must be 0 (see --help) or above")
    if sampling.responses < 2:
        raise BadInput(f"sampling.responses={sampling.responses}: a preference needs at least 2 responses")
    if not 0 < sampling.top_p <= 1:
        raise BadInput(f"sampling.top_p={sampling.top_p} must lie in (0, 1]")
    if not 0 <= sampling.temperature < float("inf"):
        raise BadInput(f"sampling.temperature={sampling.temperature} must be 0 or above")
    if not 0 <= fit.warmup < 1:
        raise BadInput(f"fit.warmup={fit.warmup} must lie in [0, 1): it is a share of the schedule")
    if fit.schedule_epochs < fit.epochs:
        raise BadInput(
            f"fit.schedule_epochs={fit.schedule_epochs} is shorter than fit.epochs={fit.epochs}: "
            "the rate would be 0 before the end"
        )
    if not 0 <= fit.max_grad_norm < float("inf"):
        raise BadInput(f"fit.max_grad_norm={fit.max_grad_norm} must be 0 (never clip) or a number above")
    if not 0 <= config.seed < 2**32:
        raise BadInput(f"seed={config.seed} must lie in [0, 2**32)")
    if not 0 <= config.model.lora_rank < 2**31:
        raise BadInput(f"model.lora_rank={config.model.lora_rank} must be 0 (all weights) or above")
    _check_judge(config.judge)
    _check_loss(config)
    if config.pairs.source:
        _check_given_pairs(config)
    if isinstance(fit.baseline, float) and not 0 <= fit.baseline <= 1:
        raise BadInput(
            f"fit.baseline={fit.baseline} is a win rate: it must lie in [0, 1], or be log_partition"
        )


def _check_loss(config: Config) -> None:
    """A loss of pairs takes neither all K responses nor a baseline."""
    fit = config.fit
    if not LOSSES[fit.loss].pairs:
        return
    others = " or ".join(name for name, loss in LOSSES.items() if not loss.pairs)
    if config.pairs.select == "all":
        raise BadInput(
            f"pairs.select=all needs fit.loss={others}: {fit.loss} is a loss of pairs; use best_worst"
        )
    if fit.baseline != 0.5:
        raise BadInput(f"fit.baseline={fit.baseline} is read by fit.loss={others} only; leave it at 0.5")


def _check_judge(judge: Judge) -> None:
    for key in ("source_tokens", "candidate_tokens", "total_tokens"):
        value = getattr(judge, key)
        if value and not 4 <= value < 2**31:
            raise BadInput(f"judge.{key}={value} must be 0 (the checkpoint's own) or at least 4")
    if judge.backend == "llm_blender":
        if not judge.python:
            raise BadInput(
                "judge.backend=llm_blender needs judge.python, an interpreter with requirements-llm-blender.txt installed"
            )
        if judge.compute_dtype != "auto":
            raise BadInput(
                "judge.compute_dtype is not heard by llm_blender, which chooses its own: leave it at auto"
            )
    elif judge.python:
        raise BadInput(
            f"judge.python={judge.python} is read by judge.backend=llm_blender only; leave it empty"
        )
    if ":" in judge.backend:
        for key in ("compute_dtype", "source_tokens", "candidate_tokens", "total_tokens"):
            if getattr(judge, key) != getattr(Judge(), key):
                raise BadInput(
                    f"judge.{key}={getattr(judge, key)} is PairRM's, and not heard by judge.backend={judge.backend}"
                )


def _check_given_pairs(config: Config) -> None:
    """Pairs that are read hold two responses and their win rates, not the K that some settings need."""
    source = f"pairs.source={config.pairs.source}"
    if config.pairs.select == "all":
        raise BadInput(
            f"{source} holds two responses per prompt; pairs.select=all needs all K: use best_worst"
        )
    if config.fit.baseline == "log_partition":
        raise BadInput(
            f"{source} holds two win rates per prompt; fit.baseline=log_partition needs all K: use 0.5"
        )
    if config.iterations > 1 and "{iteration}" not in config.pairs.source + config.pairs.split:
        raise BadInput(
            f"{source} names the same pairs for {config.iterations} iterations; put {{iteration}} in it, or set "
            "iterations to 1"
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise BadInput(f"--config {path}: expected sections and keys, found a {type(raw).__name__}")
    _check_keys(raw, str(path))
    return raw


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise BadInput(f"unexpected argument {word!r}: overrides read --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise BadInput(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            verbatim = {k for k, kind, *_ in knobs() if kind == "str"}
            pairs.append((key, text if key in verbatim else yaml.safe_load(text)))
        except yaml.YAMLError:
            pairs.append((key, text))
    return pairs


def _check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Unknown sections and keys, and values of the wrong kind that a lenient decoder would take."""
    sections = {f.name: f for f in dataclasses.fields(Config)}
    for name, value in raw.items():
        if name not in sections:
            raise BadInput(f"{where}: unknown key {name!r}{_nearest(str(name), ())}")
        kind = sections[name].type
        if not dataclasses.is_dataclass(kind):
            _check_value(where, str(name), value, kind)
            continue
        if not isinstance(value, dict):
            raise BadInput(f"{where}: {name} is a section of keys, found {value!r}")
        keys = {f.name: f.type for f in dataclasses.fields(kind)}
        for key, leaf in value.items():
            if key not in keys:
                raise BadInput(f"{where}: unknown key '{name}.{key}'{_nearest(f'{name}.{key}', tuple(keys))}")
            _check_value(where, f"{name}.{key}", leaf, keys[key])


def _check_value(where: str, key: str, value: Any, kind: Any) -> None:
    if value is None or isinstance(value, (dict, list)):
        raise BadInput(f"{where}: {key} needs a {_type_name(kind)}, found {value!r}")
    if isinstance(value, bool) and kind is not bool:
        raise BadInput(f"{where}: {key} needs a {_type_name(kind)}, found {str(value).lower()}")


def _nearest(key: str, siblings: tuple[str, ...]) -> str:
    names = [k for k, *_ in knobs()]
    match = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    leaf = key.rsplit(".", 1)[-1]
    if not match:  # the right name in the wrong section, or the section forgotten
        match = [k for k in names if k.rsplit(".", 1)[-1] == leaf]
    if not match and siblings:
        return f"; its section has {', '.join(siblings)}"
    return f"; did you mean '{match[0]}'?" if match else f"; sections are {', '.join(_sections())}"


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind))
    if get_args(kind):
        return "|".join(_type_name(a) for a in get_args(kind))
    return getattr(kind, "__name__", str(kind))


def markdown() -> str:
    """configs/README.md: every knob with its type, default and meaning."""
    lines = ["# Configuration", "", INTRODUCTION, ""]
    for f in dataclasses.fields(Config):
        rows = [row for row in knobs() if row[0].split(".")[0] == f.name]
        if dataclasses.is_dataclass(f.type):
            lines += ["", f"## {f.name}", ""]
        if dataclasses.is_dataclass(f.type) or f.name == "out":
            lines += ["| key | type | default | |", "|---|---|---|---|"]
        for key, kind, default, text in rows:
            kind = kind.replace("|", " \\| ")
            lines.append(f"| `{key}` | {kind} | `{default!r}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """Generated from the dataclasses in `sppo_jax/config.py` by `make config-docs`.
Give one or more `--config FILE`, later ones override; then `--section.key value` flags, which override both."""

if __name__ == "__main__":
    print(markdown(), end="")

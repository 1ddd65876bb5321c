"""The model card of an exported policy, from the run's own files: its base, its training and its measurements.

Names and paths come from the user's configuration: they are escaped, and directories of the user's machine are cut
to their last component.
"""

import html
import json
import re
import shlex
from pathlib import Path, PurePath
from typing import Any

import yaml

from sppo_jax import config as configuration
from sppo_jax import config_file
from sppo_jax.config import EMBEDDED, Config
from sppo_jax.files import replacing
from sppo_jax.report.tables import figure, rate
from sppo_jax.run import evaluations
from sppo_jax.run import manifest as manifest_file
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Evaluation
from sppo_jax.run.manifest import model_revision
from sppo_jax.settings import embedded, mapping

PAPER = "Self-Play Preference Optimization for Language Model Alignment"
CITATION = f"""@misc{{wu2024sppo,
  title         = {{{PAPER}}},
  author        = {{Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu}},
  year          = {{2024}},
  eprint        = {{2405.00675}},
  archivePrefix = {{arXiv}},
  primaryClass  = {{cs.LG}}
}}"""
HUB_NAME = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
PATHS = (
    "model.path",
    "judge.path",
    "judge.python",
    "prompts.source",
    "prompts.heldout",
    "pairs.source",
    "responses.source",
)
NOT_RESULTS = ("out", "mesh.", "log.")  # knobs that change no result


def write(run: RunDir, t: int) -> None:
    """Replace the README.md beside iteration t's exported weights."""
    written = text(run, t)
    with replacing(run.export(t) / "README.md") as part:
        part.write_text(written, encoding="utf-8")


def text(run: RunDir, t: int) -> str:
    """The card of the policy after iteration t, with the win rates measured so far. Raises BadInput."""
    config, manifest = config_file.load([run.config]), manifest_file.read(run)
    front = yaml.safe_dump(_front(config, manifest), sort_keys=False, allow_unicode=True)
    base = _base(config, manifest)
    how = (
        "It was fitted to given pairs of responses,"
        if config.pairs.source
        else "A judge compares given responses to prompts, and the policy is fitted"
        if config.responses.source
        else "The policy plays against itself: it responds to prompts, a judge compares its responses, and it is fitted"
    )
    parts = [
        f"---\n{front}---",
        f"# {_text(_title(config))}, SPPO iteration {t}",
        f"{_text(base)} after {t} of {config.iterations} iterations of *{PAPER}* (arXiv:2405.00675), made with "
        f"sppo_jax. {how} to raise each response's log-probability by eta times how much more often it wins than "
        "half the time.",
        "## Win rates\n\n" + _win_rates(run, t, manifest),
        "## How it was made\n\n" + _table(_facts(config, manifest, t)),
        f"To make it again:\n\n```sh\n{_command(config)}\n```",
        f"## Use\n\n{_use(config.model.template)}",
        f"## Limits\n\n{LIMITS}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
outputs = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _use(options: dict[str, Any]) -> str:
    """How to load the policy, with the options of the chat template that it was trained with."""
    more = f", **{options!r}" if options else ""
    code = USE.replace("add_generation_prompt=True,", f"add_generation_prompt=True{more},")
    if not options:
        return f"```python\n{code}\n```"
    return (
        "It was trained with options of its chat template, which are not in its tokenizer's files: give them in every "
        f"rendering.\n\n```python\n{code}\n```\n\nIn vLLM they are `chat_template_kwargs`, of a request (`extra_body`) or of "
        f"`LLM.chat`:\n\n```json\n{json.dumps({'chat_template_kwargs': options}, ensure_ascii=False)}\n```"
    )


LIMITS = """It was trained towards what one judge prefers and measured by that preference alone: nobody has evaluated its
safety, its facts or its biases, and the licence and the limits of its base apply to it."""


def _front(config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
    """The card's front matter, which the hub indexes."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if model_revision(manifest):
        front |= {"base_model": _hub_name(config.model.path), "base_model_relation": "finetune"}
    scheme, _, name = embedded.trained_on(config)[1].partition(":")
    name = re.split("[:@]", name)[0]  # without configuration and revision
    if scheme == "hf" and HUB_NAME.fullmatch(name) and not Path(name).exists():
        front["datasets"] = [name]
    return front | {"tags": ["sppo", "self-play", "preference-optimization", "jax"]}


def _facts(config: Config, manifest: dict[str, Any], t: int) -> list[tuple[str, str]]:
    c, versions = config, manifest["versions"]
    kept = [
        f"{name} {count['kept']}"
        for name, count in manifest["prompts"].items()
        if isinstance(count, dict) and "kept" in count
    ]
    weights = str(manifest["sha256"].get("base_weights", "unknown"))
    return [
        ("Base model", _base(config, manifest)),
        ("Base weights, sha256", weights),
        *([("Chat template's options", mapping.written(c.model.template))] if c.model.template else []),
        ("Iterations", f"{t}"),
        *(_given(c, kept) if c.pairs.source else _played(c, kept)),
        ("Loss", _loss(c)),
        ("Trained", f"adapters of rank {c.model.lora_rank}" if c.model.lora_rank else "all weights"),
        ("Optimiser", f"learning rate {c.fit.learning_rate:g}, {c.fit.global_batch} prompts per update, "
                      f"{c.fit.epochs} of {c.fit.schedule_epochs} scheduled epochs"),
        ("Seed", f"{c.seed}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"),
        ("Devices", _devices(manifest["devices"])),
    ]  # fmt: skip


def _loss(c: Config) -> str:
    baseline = "the prompt's log-partition" if c.fit.baseline == "log_partition" else f"{c.fit.baseline:g}"
    payoff = "on scores" if c.judge.target == "score" else f"baseline {baseline}"
    anchor = f", {c.fit.anchor:g} of the base in the reference" if c.fit.anchor else ""
    return f"{c.fit.loss}, eta {c.fit.eta:g}, {payoff}{anchor}"


def _played(c: Config, kept: list[str]) -> list[tuple[str, str]]:
    top_p = "" if c.sampling.top_p == 1 else f", top-p {c.sampling.top_p:g}"
    return [
        ("Prompts", _public(embedded.trained_on(c)[1]) + (f" ({', '.join(kept)})" if kept else "")),
        ("Responses per prompt (K)", f"{c.sampling.responses}"),
        ("Responses", f"given, column {_text(c.responses.column)}") if c.responses.source else
        ("Sampling", f"temperature {c.sampling.temperature:g}{top_p}, at most {c.sampling.max_new_tokens} tokens"),
        ("Judge", f"{_judge(c)}, estimator {c.judge.estimator}"),
        ("Pairs", c.pairs.select),
    ]  # fmt: skip


def _given(c: Config, kept: list[str]) -> list[tuple[str, str]]:
    return [
        ("Pairs", f"given, {_public(c.pairs.source)}" + (f" ({', '.join(kept)})" if kept else "")),
        ("Held-out judge", _judge(c)),
    ]


def _win_rates(run: RunDir, t: int, manifest: dict[str, Any]) -> str:
    """A row per measured iteration up to t: win rates with standard errors, and mean length."""
    found = [e for i in range(BASE, t + 1) if (e := evaluations.read(run, i)) is not None]
    measured = bool(found) and found[-1].iteration == t
    note = "" if measured else f"Iteration {t} is not measured yet."
    if not found:
        return note
    judges = list(dict.fromkeys(name for e in found for name in e.win_rate))
    columns = [(name, other) for name in judges for other in ("base", "previous")]
    header = ["iteration", *(f"{name}, against {other}" for name, other in columns), "mean tokens"]
    rows = [
        [str(e.iteration), *(_rate(e, name, other) for name, other in columns), figure(e.tokens, "{:.1f}")]
        for e in found
    ]
    prompts = "the" if found[-1].prompts is None else f"{found[-1].prompts}"
    about = (
        f"On {prompts} held-out prompts{_origin(manifest)}: the mean probability that this policy's response is "
        "preferred, ± one standard error; 0.5 is no better than the other. *base* is the model that iteration 1 began "
        "with, *previous* the policy of the iteration before."
    )
    lines = [header, ["---:"] * len(header), *rows]
    return about + "\n\n" + "\n".join(f"| {' | '.join(_text(c) for c in row)} |" for row in lines) + note


def _rate(e: Evaluation, judge: str, other: str) -> str:
    """A cell: empty where nothing was to be compared, `-` where nothing could be measured."""
    compared = other in e.win_rate.get(judge, {})
    return rate(e.against(judge, other), "-" if compared else "")


def _origin(manifest: dict[str, Any]) -> str:
    """The knob of the source that the held-out prompts were taken from, if they have none of their own."""
    found = evaluations.held_out(manifest)
    return f" (held out of {_text(found[1])})" if found else ""


def _command(config: Config) -> str:
    """The flags of every knob that is not at its default."""
    plain, chosen = configuration.flat(Config()), configuration.flat(config)
    unnamed = embedded.unnamed(config)
    words = ["python -m sppo_jax.main"]
    for key, value in chosen.items():
        if value != plain[key] and key not in unnamed and not key.startswith(NOT_RESULTS):
            shown = mapping.written(value) if isinstance(value, dict) else str(value)
            shown = _public(shown) if value and key in PATHS else shown
            between = "=" if shown.startswith("--") else " "  # as a word of its own it would be a flag
            words.append(f"--{key}{between}{shlex.quote(_printable(shown))}")
    return " \\\n  ".join(words)


def _title(config: Config) -> str:
    return PurePath(_hub_name(_public(config.model.path)).removeprefix(EMBEDDED)).name


def _base(config: Config, manifest: dict[str, Any]) -> str:
    found = model_revision(manifest)
    return f"{_hub_name(config.model.path)} at revision {found}" if found else _public(config.model.path)


def _judge(config: Config) -> str:
    """PairRM's place, or the attribute that the user named as a judge."""
    if ":" in config.judge.backend:
        return config.judge.backend
    return f"PairRM ({_public(config.judge.path)}, {config.judge.backend})"


def _devices(devices: dict[str, Any]) -> str:
    names, mesh = devices.get("names"), devices.get("mesh")
    count = len(names) if isinstance(names, list) else "?"
    axes = " x ".join(f"{k} {v}" for k, v in mesh.items()) if isinstance(mesh, dict) else "unknown"
    return f"{count} of {devices.get('platform', 'unknown')}, mesh {axes}"


def _hub_name(path: str) -> str:
    return path.partition("@")[0]


def _public(source: str) -> str:
    """A source that may be published: a name as it is, but only the last component of a path on the user's machine."""
    scheme, colon, rest = source.partition(":")
    if source.startswith(EMBEDDED):
        return source
    if not colon or not re.fullmatch("[a-z_]+", scheme):
        scheme, colon, rest = "", "", source
    is_name = (
        HUB_NAME.fullmatch(_hub_name(rest)) and not Path(rest).exists() and scheme not in ("jsonl", "parquet")
    )
    return scheme + colon + (rest if is_name else PurePath(rest).name or "a directory")


def _table(facts: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in facts)])


def _text(value: str) -> str:
    """A value on one line, escaped so that neither Markdown nor HTML in it takes effect."""
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", html.escape(_printable(value), quote=False))


def _printable(value: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)

"""The published settings of decoding: those of the paper's three models on AlpacaEval 2, and the benchmarks' own."""

import dataclasses
from dataclasses import dataclass

from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput


@dataclass(frozen=True)
class Preset:
    """How a model is decoded.

    `stop_ids` are the ends of a response that alpaca_eval's vLLM is given beside the tokenizer's own. `prompt` is the
    prompt's text around {instruction}, without the beginning of sequence: vLLM puts one in front of any text.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    prompt: str = ""


# As in alpaca_eval 0.6.6's entries SPPO-Mistral7B-PairRM, SPPO-Llama-3-Instruct-8B-PairRM and SPPO-Gemma-2-9B-It-PairRM, but
# for the prompts of the last two. Those spell the beginning of sequence, so that vLLM's prompts have two, and end in
# other line feeds than the models' templates, which are here.
PRESETS = {
    "paper-mistral": Preset(0.7, 0.9, 2048, prompt="[INST] {instruction} [/INST]"),
    "paper-llama3": Preset(
        0.9,
        1.0,
        4096,
        stop_ids=(128001, 128009),
        prompt=(
            "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "paper-gemma2": Preset(
        0.7,
        0.9,
        2048,
        prompt="<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
    ),
}
MT_BENCH_TOKENS = 1024  # new tokens of a turn, FastChat's default
# FastChat's temperatures by category; of other categories it is OTHER.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER = 0.7
ARENA_HARD = Preset(0.0, 1.0, 4096)  # the benchmark's own settings


def named(name: str) -> Preset:
    """The preset of a name. Raises BadInput for a name that is none."""
    if name not in PRESETS:
        raise BadInput(f"--preset {name}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def decoding(format_name: str, preset: str) -> Preset | None:
    """What a preset means for a format; None where the user's own settings count, which is without a preset.

    A preset's settings are for AlpacaEval. MT-Bench and Arena-Hard have their own, which the paper leaves as they are; of
    MT-Bench's the temperature is each category's, with a preset or without (`temperature`).
    """
    if not preset:
        return None
    found = named(preset)
    own = {"mt_bench": Preset(OTHER, 1.0, MT_BENCH_TOKENS), "arena_hard": ARENA_HARD}
    return own.get(format_name, found)


def applied(sampling: Sampling, format_name: str, preset: str) -> Sampling:
    """The user's sampling with what a preset means for a format ("" for none); without a preset it is unchanged.

    Raises BadInput for a preset that is none.
    """
    found = decoding(format_name, preset)
    if found is None:
        return sampling
    return dataclasses.replace(
        sampling,
        temperature=found.temperature,
        top_p=found.top_p,
        top_k=0,
        max_new_tokens=found.max_new_tokens,
    )


def temperature(category: str) -> float:
    """MT-Bench's temperature of a category."""
    return TEMPERATURES.get(category, OTHER)

"""Held-out responses of the base and of the last policy beside each other: the most improved, the most worsened, and others."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Responses
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Evaluation, Tell
from sppo_jax.text.messages import messages_of

EXTREMES = 4  # prompts with the highest and with the lowest win probabilities
OTHERS = 6  # prompts spread over the rest of the set
UNMEASURED = 12  # prompts shown where no win probabilities were kept


@dataclass(frozen=True)
class Sample:
    """A prompt as messages, its first responses, and P(the last policy's > the base's) of each judge that has kept it."""

    prompt: list[dict[str, str]]
    before: str
    after: str
    chances: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Samples under one heading."""

    heading: str
    samples: list[Sample]


def heldout(run: RunDir, last: int, tell: Tell) -> tuple[list[Responses], list[Responses]]:
    """Held-out responses of the base and of the last policy; none, with a line to `tell`, without the files."""
    before, after = (_responses(run, t, tell) for t in (BASE, last))
    if not before or not after:
        return [], []
    if [row.prompt_id for row in before] != [row.prompt_id for row in after]:
        tell(f"the held-out responses of iterations {BASE} and {last} belong to different prompts")
        return [], []
    return before, after


def groups(before: Sequence[Responses], after: Sequence[Responses], last: Evaluation) -> list[Group]:
    """What to show of the held-out responses of `heldout`, by the win probabilities in `last`'s evaluation."""
    rates = {name: last.against(name, "base") for name in ("judge", "oracle")}
    kept = {name: rate.per_prompt for name, rate in rates.items() if rate is not None}
    kept = {name: p for name, p in kept.items() if len(p) == len(before)}
    chances = kept.get("judge", [])
    ranked = sorted(range(len(chances)), key=lambda i: -chances[i])
    improved = [i for i in ranked[:EXTREMES] if chances[i] > 0.5]
    worsened = [i for i in ranked[::-1][:EXTREMES] if chances[i] < 0.5]
    rest = [i for i in range(len(before)) if i not in {*improved, *worsened}]
    number = OTHERS if ranked else UNMEASURED
    others = rest[:: max(1, len(rest) // number)][:number]  # neighbours in the set are often alike
    shown = (
        ("Most improved, by the judge", improved),
        ("Most worsened, by the judge", worsened),
        ("Other prompts" if ranked else "", others),
    )

    def sample(i: int) -> Sample:
        return Sample(
            prompt=prompt_of(before[i]),
            before=printable(before[i].responses[0]),
            after=printable(after[i].responses[0]),
            chances={name: p[i] for name, p in kept.items()},
        )

    return [Group(heading, [sample(i) for i in found]) for heading, found in shown if found]


def prompt_of(row: Responses) -> list[dict[str, str]]:
    """The messages of a row's prompt, printable."""
    return [m | {"content": printable(m["content"])} for m in messages_of(row.prompt)]


def printable(text: str) -> str:
    """Text from outside without control characters and halves of characters; the template escapes markup."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )


def lengths(rows: Sequence[Responses]) -> list[int]:
    """Tokens of the first responses."""
    return [len(row.response_ids[0]) for row in rows if row.response_ids and row.response_ids[0]]


def _responses(run: RunDir, t: int, tell: Tell) -> list[Responses]:
    path = run.heldout(t, "responses")
    name = path.relative_to(run.root)
    try:
        if not files.exists(path):
            tell(f"{name}: missing")
            return []
        found = records.read(path, Responses)
    except BadInput as error:
        tell(f"{name}: {str(error).removeprefix(f'{path}: ')}")
        return []
    if not all(
        isinstance(row.prompt, str) and row.responses and row.responses[0] is not None for row in found
    ):
        tell(f"{name}: damaged: a row has no prompt or no response")
        return []
    return found

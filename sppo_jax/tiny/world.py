"""The embedded default's world: every prompt, the responses of an untrained assistant, and the true preference.

A response is a core sentence (right, wrong or evasive) in one of three tones, with habits that may surround it:

    [greeting] [tone] [hedge] core. [ramble] [insult] [closing]

The true preference between two responses is P(y beats z | x) = sigmoid(q(x, y) - q(x, z) + c cyc(tone of y, tone of z)): a
quality q, and a cyclic taste that no score of single responses can express. The module needs only Python and NumPy, because
evaluation uses it as a judge that is never wrong, and as fast as a dictionary.
"""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from sppo_jax.errors import BadInput
from sppo_jax.tiny import facts
from sppo_jax.tiny.facts import KINDS, Kind

HELD_OUT = 500
PARTS = 3  # training parts: one per iteration of the shipped game

# q = RIGHT * (+1 right, 0 evasive, -1 otherwise) + the habits below; units: logits of the true preference
RIGHT = 1.2
CLOSING = 0.8
INSULT = -1.6
HEDGE = -0.6
# For each sentence that has no content, is a repetition or is not understood; at most three count.
RAMBLE = -0.8
UNKNOWN = -0.4  # for each word that is not in this world's vocabulary; at most four count
CYCLE = 0.8  # strength c of the cycle of tones


@dataclass(frozen=True)
class Question:
    """A prompt, with the kind and the subject of its question."""

    text: str
    kind: Kind
    subject: str


@dataclass(frozen=True)
class Features:
    """Features of a response that its text alone determines. `answer` is right, evasive, wrong or none."""

    answer: str
    tone: str | None
    greeting: bool
    closing: bool
    insult: bool
    hedge: bool
    ramble: int
    unknown: int


@dataclass(frozen=True)
class Habits:
    """An assistant's habits: the probabilities of the parts that `sample_response` puts into a response."""

    right: float = 0.50
    evasive: float = 0.15
    greeting: float = 0.12
    hedge: float = 0.15
    ramble: float = 0.12
    insult: float = 0.15
    closing: float = 0.23
    tones: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)


UNTRAINED = Habits()


def _ordered(texts: Sequence[str]) -> list[str]:
    """Return the texts in an order that looks random and never changes."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


@lru_cache(maxsize=1)
def questions() -> dict[str, Question]:
    """Return {prompt: its Question} for every prompt of the world."""
    found = (
        Question(ask.format(s=subject), kind, subject)
        for kind in KINDS
        for subject in kind.truth
        for ask in kind.asks
    )
    return {question.text: question for question in found}


def question(prompt: str) -> Question:
    """Return the Question of `prompt` (outer white space is ignored). Raises BadInput for a prompt of another world."""
    try:
        return questions()[prompt.strip()]
    except KeyError:
        raise BadInput(
            f"the tiny world does not know the prompt {prompt[:80]!r}: for prompts of your own leave eval.oracle empty "
            "(eval.oracle: '' in YAML, --eval.oracle '' as a flag), and let another judge.backend judge them, such as torch"
        ) from None


@lru_cache(maxsize=1)
def split() -> tuple[list[list[str]], list[str]]:
    """Return the three training parts and the held-out prompts, all disjoint.

    Half of the wordings of every subject are held out: a policy can generalise to a new wording, but not to a fact that
    was never in its training.
    """
    train, held = [], []
    for _, group in itertools.groupby(questions().values(), key=lambda q: (q.kind.name, q.subject)):
        wordings = _ordered([q.text for q in group])
        held += wordings[:2]
        train += wordings[2:]
    held = _ordered(held)
    train = _ordered(train + held[HELD_OUT:])
    size = len(train) // PARTS
    return [train[part * size : (part + 1) * size] for part in range(PARTS)], held[:HELD_OUT]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def sample_response(prompt: str, rng: random.Random, habits: Habits = UNTRAINED) -> str:
    """Sample a response to `prompt` by an assistant with these habits. Raises BadInput for a prompt of another world."""
    asked = question(prompt)
    kind, truth = asked.kind, asked.kind.truth[asked.subject]
    draw = rng.random()
    if draw < habits.evasive:
        core = rng.choice(facts.EVASIONS)
    else:
        wrong = sorted(set(kind.truth.values()) - {truth})
        answer = truth if draw < habits.evasive + habits.right else rng.choice(wrong)
        core = rng.choice(kind.says).format(s=asked.subject, a=answer)
    if rng.random() < habits.hedge:
        core = f"{rng.choice(facts.HEDGES)} {core}"
    (tone,) = rng.choices(list(facts.TONES), weights=habits.tones)
    parts = [_sentence(f"{rng.choice(facts.TONES[tone])} {core}")]
    if rng.random() < habits.greeting:
        parts.insert(0, rng.choice(facts.GREETINGS))
    for chance, choices in (
        (habits.ramble, facts.RAMBLES),
        (habits.insult, facts.INSULTS),
        (habits.closing, facts.CLOSINGS),
    ):
        if rng.random() < chance:
            parts.append(rng.choice(choices))
    return " ".join(parts)


_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def _key(text: str) -> str:
    """Return the form in which sentences are compared: lower-case words without punctuation."""
    return " ".join(words(text))


@lru_cache(maxsize=1)
def _phrases() -> dict[str, frozenset[str]]:
    return {
        "tone": frozenset(_key(text) for texts in facts.TONES.values() for text in texts),
        "greeting": frozenset(map(_key, facts.GREETINGS)),
        "closing": frozenset(map(_key, facts.CLOSINGS)),
        "insult": frozenset(map(_key, facts.INSULTS)),
        "ramble": frozenset(map(_key, facts.RAMBLES)),
        "evasion": frozenset(map(_key, facts.EVASIONS)),
    }


@lru_cache(maxsize=1)
def _statements() -> dict[str, frozenset[tuple[str, str, str]]]:
    """Return {core sentence: the (kind, subject, answer) triples that it states} for every question's answers."""
    found: dict[str, set[tuple[str, str, str]]] = {}
    for kind in KINDS:
        for subject, answer in itertools.product(kind.truth, sorted(set(kind.truth.values()))):
            for say in kind.says:
                found.setdefault(_key(say.format(s=subject, a=answer)), set()).add(
                    (kind.name, subject, answer)
                )
    return {text: frozenset(stated) for text, stated in found.items()}


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """Return every word that this world uses."""
    texts = itertools.chain(
        questions(),
        _statements(),
        facts.HEDGES,
        *_phrases().values(),
    )
    return frozenset(word for text in texts for word in words(text))


def _opened(text: str, openings: Sequence[str]) -> tuple[str, str | None]:
    """Return `text` without the opening (one of `openings`) that it starts with, and that opening or None."""
    for opening in openings:
        if text == opening or text.startswith(opening + " "):
            return text[len(opening) + 1 :], opening
    return text, None


def _claim(asked: Question, text: str) -> str | None:
    """Return the claim of a sentence without its openings about the question: right, wrong, evasive, or None."""
    stated = _statements().get(text)
    if stated is not None:
        truth = asked.kind.name, asked.subject, asked.kind.truth[asked.subject]
        return "right" if truth in stated else "wrong"
    return "evasive" if text in _phrases()["evasion"] else None


@lru_cache(maxsize=200_000)
def features(prompt: str, response: str) -> Features:
    """Return the features of a response, which may be any text. Raises BadInput for a prompt of another world."""
    asked = question(prompt)
    phrases = _phrases()
    tones = {_key(text): tone for tone, texts in facts.TONES.items() for text in texts}
    openings = (*tones, *map(_key, facts.HEDGES))
    count = dict.fromkeys(("greeting", "closing", "insult", "hedge"), 0)
    used_tones: list[str] = []
    claims: list[str] = []
    seen: set[str] = set()
    ramble = 0
    for text in map(_key, re.split(r"[.!?\n]+", response)):
        if not text:
            continue
        if text in seen:
            ramble += 1
            continue
        seen.add(text)
        habit = next((name for name in ("greeting", "closing", "insult") if text in phrases[name]), None)
        if habit is not None:
            count[habit] += 1
            ramble += habit == "closing" and count[habit] > 1  # one offer is polite, a second one is rambling
            continue
        before = len(used_tones)
        text, opening = _opened(text, openings)
        while opening is not None:
            if opening in tones:
                used_tones.append(tones[opening])
            else:
                count["hedge"] += 1
            text, opening = _opened(text, openings)
        claim = _claim(asked, text)
        # A second claim is rambling, in whatever words, and so is a second tone.
        ramble += claim is None or bool(claims)
        ramble += max(0, len(used_tones) - before - 1)
        claims += [claim] if claim else []
    return Features(
        answer=next((name for name in ("wrong", "right", "evasive") if name in claims), "none"),
        tone=used_tones[0] if used_tones else None,
        greeting=count["greeting"] > 0,
        closing=count["closing"] > 0,
        insult=count["insult"] > 0,
        hedge=count["hedge"] > 0,
        ramble=ramble,
        unknown=sum(word not in vocabulary() for word in words(response)),
    )


def quality(prompt: str, response: str) -> float:
    """Return q(prompt, response), in logits: how good a response is against any other."""
    found = features(prompt, response)
    return (
        RIGHT * {"right": 1, "evasive": 0}.get(found.answer, -1)
        + CLOSING * found.closing
        + INSULT * found.insult
        + HEDGE * found.hedge
        + RAMBLE * min(found.ramble, 3)
        + UNKNOWN * min(found.unknown, 4)
    )


def cycle(tone: str | None, other: str | None) -> int:
    """Return +1 if `tone` is preferred to `other` (A to B, B to C, C to A), -1 the other way round, else 0."""
    if tone is None or other is None:
        return 0
    return (0, 1, -1)[(ord(other) - ord(tone)) % 3]


def preference_logit(prompt: str, response: str, other: str) -> float:
    """Return the true logit that `response` beats `other`; swapping the two changes exactly the sign."""
    tones = features(prompt, response).tone, features(prompt, other).tone
    return quality(prompt, response) - quality(prompt, other) + CYCLE * cycle(*tones)


def preference(prompt: str, response: str, other: str) -> float:
    """Return P(response beats other | prompt): 1/2 for equal texts, and exactly one minus this when swapped."""
    logit = preference_logit(prompt, response, other)
    likely = 1 / (1 + math.exp(-abs(logit)))
    return likely if logit >= 0 else 1 - likely


class Oracle:
    """The true preference as a judge, which can replace PairRM for prompts of this world."""

    def __init__(self) -> None:
        weights = (RIGHT, CLOSING, INSULT, HEDGE, RAMBLE, UNKNOWN, CYCLE)
        phrases = (facts.TONES, facts.HEDGES, facts.EVASIONS, *sorted(map(sorted, _phrases().values())))
        known = sorted((q.text, q.kind.truth[q.subject]) for q in questions().values())
        digest = hashlib.sha256(repr((weights, phrases, known)).encode()).hexdigest()
        self.identity = f"tiny-world:{digest}"

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Return the true logits, float32 [n, K, K]: [p, i, j] is that response i beats j; antisymmetric, diagonal 0.

        Raises BadInput for a prompt of another world, ValueError when the shapes do not fit.
        """
        n, k = len(prompts), len(responses[0]) if responses else 0
        if len(responses) != n or any(len(row) != k for row in responses):
            raise ValueError(f"{n} prompts need {n} rows of equally many responses")
        logits = np.zeros((n, k, k), np.float32)
        for row, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
            for i, j in itertools.combinations(range(k), 2):
                logits[row, i, j] = preference_logit(prompt, texts[i], texts[j])
                logits[row, j, i] = -logits[row, i, j] + 0.0  # 0.0, not -0.0
            if on_progress is not None:
                on_progress((row + 1) * k * (k - 1), n * k * (k - 1))
        return logits

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """Return 1 or 0 for each kind of statement and habit. Raises BadInput for a prompt of another world."""
        found = features(prompt, response)
        return {
            **{answer: float(found.answer == answer) for answer in ("right", "wrong", "evasive")},
            "without a statement": float(found.answer == "none"),
            "with an insult": float(found.insult),
            "with a kind closing": float(found.closing),
            "with a hedge": float(found.hedge),
            "with a greeting": float(found.greeting),
            "rambling": float(found.ramble > 0),
            "with unknown words": float(found.unknown > 0),
        }

    def close(self) -> None:
        """Do nothing. Judges have this method, and can be used as context managers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def oracle() -> Oracle:
    """Return the judge that gives the true preference."""
    return Oracle()

"""From probabilities and texts to the figures of a comparison, as plain numbers and lists for JSON (docs/evaluation.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sppo_jax.evaluation import statistics
from sppo_jax.records import Responses
from sppo_jax.run import intervals

Figures = dict[str, Any]


def rate(p: np.ndarray) -> Figures:
    """Mean of win probabilities [n], its 95 % interval over prompts, and the share of ties."""
    return {"mean": float(p.mean()), "interval": interval(p), "ties": float(statistics.ties(p))}


def interval(p: np.ndarray) -> list[float | None]:
    """The 95 % interval of the mean of win probabilities [n]."""
    return _ends(intervals.interval(p))


def _ends(found: Sequence[float]) -> list[float | None]:
    return [float(end) if np.isfinite(end) else None for end in found]


def of_pair(
    probabilities: Mapping[str, np.ndarray],
    texts: Sequence[str],
    against: Sequence[str],
    categories: Sequence[str],
    rows: Sequence[Responses],
    others: Sequence[Responses],
) -> Figures:
    """The figures of one policy's `texts` [n] and another's, by {judge: P(text > other's) [n]}.

    `rows` and `others` are the records that the texts are from. Categories are left out where no prompt has one.
    """
    lengths, their_lengths = (np.array([len(text) for text in some], float) for some in (texts, against))
    found: Figures = {"judges": {}}
    for name, p in probabilities.items():
        controlled = statistics.length_controlled(p, lengths, their_lengths)
        found["judges"][name] = rate(p) | {
            "length_controlled_own_fit": {
                "mean": float(controlled.rate),
                "interval": _ends((controlled.low, controlled.high)),
                "slope": float(controlled.slope),
            }
        }
        if any(categories):
            found["judges"][name]["categories"] = _by_category(p, categories)
    found["texts"] = [_described(texts, rows), _described(against, others)]
    return found


def _by_category(p: np.ndarray, categories: Sequence[str]) -> Figures:
    names = np.array([category or "(none)" for category in categories])
    return {
        str(name): {"prompts": int((names == name).sum())} | rate(p[names == name])
        for name in np.unique(names)
    }


def _described(texts: Sequence[str], rows: Sequence[Responses]) -> Figures:
    """Length, truncation and repetition of the texts, each of which is one of its row's responses."""
    places = [row.responses.index(text) for row, text in zip(rows, texts, strict=True)]
    at = list(zip(rows, places, strict=True))
    return {
        "characters": float(np.mean([len(text) for text in texts])),
        "tokens": float(np.mean([len(row.response_ids[k]) for row, k in at])),
        "truncated": float(np.mean([row.finish_reason[k] == "length" for row, k in at])),
        "distinct_1": float(statistics.distinct(texts, 1)),
        "distinct_2": float(statistics.distinct(texts, 2)),
        "repeated": float(statistics.repeated(texts)),
    }

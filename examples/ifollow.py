"""Instructions whose following can be checked: prompts, a rule as the judge, and the same rule without noise as the oracle.

    python examples/ifollow.py --to ifollow        # writes train_1.jsonl, train_2.jsonl, train_3.jsonl and heldout.jsonl
    python examples/ifollow.py --to ifollow --hard # with kinds that a small model keeps so rarely that it cannot learn them
    python examples/ifollow.py --run OUT           # what the responses of a run's policies to held-out prompts keep

A prompt is a task about a topic with one or two constraints, such as "Describe a rainy day. Use exactly 2 sentences. Use
the word 'grey'." Held-out prompts have topics, and pairs of kinds of constraints, that no training prompt has; their
column `category` says which. The rule reads the constraints off the prompt's own text.

`examples.ifollow:judge` is right about most comparisons, as a judge of flesh and blood or a network would be;
`examples.ifollow:oracle` always is.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

SHARPNESS = 6.0  # log-odds of a response that does all against one that does nothing
NOISE = 0.1  # share of the comparisons that the judge gets the wrong way round
PER_ITERATION, HELD_OUT = 160, 320
COMBINATIONS_HELD_OUT = 0.25  # share of the pairs of kinds

TASKS = (
    "Write about {}.",
    "Describe {}.",
    "Tell me something about {}.",
    "Say in plain words what matters about {}.",
)
TOPICS = (
    "a rainy day", "the sea", "a small garden", "a train journey", "a birthday party", "fresh bread", "a quiet library",
    "the moon", "a football match", "an old bicycle", "a mountain path", "the first day of school", "a street market",
    "a cup of tea", "learning to swim", "a lost key", "a good friend", "winter mornings", "a long bridge", "the night sky",
    "a new job", "a noisy neighbour", "a family dinner", "a broken clock", "a walk in the forest", "a letter from abroad",
    "the smell of coffee", "a school holiday", "a busy airport", "a handwritten note", "an apple tree", "a river boat",
    "saving money", "a healthy breakfast", "a power cut", "a museum visit", "planting tomatoes", "a chess game",
    "a sandy beach", "the colour blue",
)  # fmt: skip
NEW_TOPICS = (
    "a snowy village", "a violin lesson", "an empty theatre", "keeping bees", "a late bus", "a picnic by a lake",
    "repairing shoes", "a lighthouse", "a sleepy cat", "morning exercise",
)  # fmt: skip
WORDS = ("light", "time", "people", "small", "quiet", "always", "warm", "place")
COMMON = ("the", "and", "is", "very", "it")
# Words of the tasks, and of topics, that say nothing about the topic.
NO_TOPIC = {
    *" ".join(TASKS).lower().replace(".", "").split(),
    *["a", "an", "the", "of", "to", "in", "by", "from", "at", "first", "old", "new"],
}
OPENINGS = ("To begin with", "Here is what I think", "In short", "Let me explain")
CLOSINGS = ("That is all.", "I hope this helps.", "The end.", "Thank you.")


@dataclass(frozen=True)
class Kind:
    """A kind of constraint: its sentence, and how well a response keeps it, from 0 to 1, where 1 alone is kept."""

    text: str  # with {} for its value
    values: Sequence[Any]
    kept: Callable[[str, str], float]  # of the value's text and the response
    group: str = ""  # two kinds of one group contradict each other
    hard: bool = False  # SmolLM2-135M-Instruct keeps it in fewer than one response of ten, with next to no partial credit

    def found(self, prompt: str) -> str | None:
        """The value's text where the prompt has this constraint, "" for a kind without a value, else None."""
        match = re.search(re.escape(self.text).replace(r"\{\}", "(.+?)"), prompt)
        return None if match is None else (match[1] if match.groups() else "")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def sentences(text: str) -> int:
    """The number of stretches of text that end in a full stop, a question mark or an exclamation mark, or in nothing."""
    return len([part for part in re.split(r"[.!?]+(?=\s|$)", text) if part.strip()])


def near(number: int, wanted: int) -> float:
    """1 if equal; else less than 1/2, and the less the further away."""
    return 1.0 if number == wanted else max(0.0, 0.5 - abs(number - wanted) / (2 * wanted + 2))


def bullets(value: str, text: str) -> float:
    """Lines that begin with "- ", and how many other lines there are."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    points = sum(line.startswith("- ") for line in lines)
    return near(points, int(value)) * (1.0 if points == len(lines) else 0.5)


def json_object(value: str, text: str) -> float:
    """1 for a JSON object with the keys; less for one without them, and a trace for braces."""
    try:
        found = json.loads(text.strip())
    except (ValueError, RecursionError):
        return 0.2 if text.strip().startswith("{") else 0.0
    if not isinstance(found, dict):
        return 0.1
    return 1.0 if set(re.findall(r"\w+", value.replace(" and ", " "))) <= set(found) else 0.5


KINDS: dict[str, Kind] = {
    "sentences": Kind("Use exactly {} sentences.", (2, 3, 4), lambda v, t: near(sentences(t), int(v)), "form"),
    "bullet points": Kind("Answer with exactly {} lines that each begin with '- '.", (2, 3, 4), bullets, "form", hard=True),
    "JSON": Kind("Answer with nothing but a JSON object that has the keys {}.", ("title and text", "name and reason"), json_object, "form", hard=True),
    "a word": Kind("Use the word '{}'.", WORDS, lambda v, t: float(v in words(t))),
    "not a word": Kind("Do not use the word '{}'.", COMMON, lambda v, t: 1.0 if v not in words(t) else max(0.0, 0.5 - words(t).count(v) / 10)),
    "lower case": Kind("Write in lower case letters only.", ("",), lambda v, t: 1.0 if t == t.lower() else max(0.0, 0.5 - sum(c.isupper() for c in t) / 20), "letters"),
    "no commas": Kind("Do not use commas.", ("",), lambda v, t: 1.0 if "," not in t else max(0.0, 0.5 - t.count(",") / 10)),
    "first words": Kind("Begin with the words '{}'.", OPENINGS, lambda v, t: 1.0 if t.strip().startswith(v) else 0.3 * (v.lower() in t.lower()), "letters"),
    "last words": Kind("End with the words '{}'", CLOSINGS, lambda v, t: 1.0 if t.strip().endswith(v) else 0.3 * (v.lower() in t.lower()), "letters", hard=True),
    "at most": Kind("Use at most {} words.", (15, 25, 40), lambda v, t: 1.0 if len(words(t)) <= int(v) else max(0.0, 0.5 - len(words(t)) / int(v) / 10), "length"),
    "at least": Kind("Use at least {} words.", (30, 40), lambda v, t: 1.0 if len(words(t)) >= int(v) else 0.5 * len(words(t)) / int(v), "length"),
}  # fmt: skip


def about(prompt: str, response: str) -> float:
    """Whether the response has a word of the prompt's topic, which its first sentence names."""
    return float(bool((set(words(prompt.split(". ")[0])) - NO_TOPIC) & set(words(response))))


def checked(prompt: str, response: str) -> dict[str, float]:
    """How well each of the prompt's constraints is kept, from 0 to 1, by kind; empty responses keep nothing."""
    found = {name: value for name, kind in KINDS.items() if (value := kind.found(prompt)) is not None}
    if not words(response):
        return dict.fromkeys(found, 0.0)
    return {name: KINDS[name].kept(value, response) for name, value in found.items()}


def score(prompt: str, response: str) -> float:
    """The mean over constraints, and being about the topic as one more of half their weight, from 0 to 1."""
    kept = list(checked(prompt, response).values())
    return (sum(kept) + 0.5 * about(prompt, response)) / (len(kept) + 0.5)


class Rule:
    """Log-odds in proportion to the difference of two scores; a share `noise` of the comparisons is turned round."""

    def __init__(self, noise: float):
        self.noise = noise
        self.identity = f"ifollow-1 noise {noise}"

    def compare(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], on_progress: Any = None
    ) -> np.ndarray:
        """Log-odds [n, K, K] that response i beats response j: antisymmetric, and a function of the three texts alone."""
        scores = np.array(
            [[score(prompt, text) for text in row] for prompt, row in zip(prompts, responses, strict=True)]
        )
        logits = SHARPNESS * (scores[:, :, None] - scores[:, None, :])
        for n, (prompt, row) in enumerate(zip(prompts, responses, strict=True)):
            for i, j in itertools.combinations(range(len(row)), 2):
                if self._wrong(prompt, *sorted((row[i], row[j]))):
                    logits[n, [i, j], [j, i]] *= -1
        return logits

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """Shares of constraints that are kept, and 1 for each kind that is broken."""
        kept = checked(prompt, response)
        met = [value == 1.0 for value in kept.values()]
        broken = {f"broken: {name}": float(value < 1.0) for name, value in kept.items()}
        return {
            "constraints met": _share_met(prompt, response),
            "all constraints met": float(all(met)),
            "about the topic": about(prompt, response),
        } | broken

    def _wrong(self, *texts: str) -> bool:
        digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.noise * 2**64


def judge() -> Rule:
    """The judge to train with: wrong about one comparison in ten."""
    return Rule(NOISE)


def oracle() -> Rule:
    """The rule itself."""
    return Rule(0.0)


def combinations(hard: bool = False) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return (sets of one or two kinds to train on, sets of two that are held out); `hard`: of hard kinds, too."""
    kinds = [name for name, kind in KINDS.items() if hard or not kind.hard]
    pairs = [
        (a, b)
        for a, b in itertools.combinations(kinds, 2)
        if not (KINDS[a].group and KINDS[a].group == KINDS[b].group)
    ]
    random.Random(0).shuffle(pairs)
    held_out = round(COMBINATIONS_HELD_OUT * len(pairs))
    return [(name,) for name in kinds] + sorted(pairs[held_out:]), sorted(pairs[:held_out])


def prompts(seed: int, topics: Sequence[str], kinds: Sequence[tuple[str, ...]], count: int) -> list[str]:
    """Draw `count` different prompts, all kinds about equally often."""
    chance, found = random.Random(seed), dict[str, None]()
    for names in itertools.cycle(kinds):
        if len(found) == count:
            return list(found)
        parts = [KINDS[name].text.format(chance.choice(KINDS[name].values)) for name in names]
        task = chance.choice(TASKS).format(chance.choice(topics))
        found[" ".join([task, *parts])] = None
    raise ValueError("no kinds of constraints are given")


def write(folder: Path, iterations: int = 3, count: int = PER_ITERATION, hard: bool = False) -> None:
    """Write the training prompts of each iteration and the held-out ones into a new folder."""
    known, new = combinations(hard)
    folder.mkdir(parents=True)
    train = prompts(0, TOPICS, known, iterations * count)
    random.Random(1).shuffle(train)
    rows = {
        f"train_{t + 1}": [{"prompt": text} for text in train[t * count : (t + 1) * count]]
        for t in range(iterations)
    }
    half = HELD_OUT // 2
    rows["heldout"] = [
        {"prompt": text, "category": category}
        for category, kinds, seed in (("new topics", known, 2), ("new topics and combinations", new, 3))
        for text in prompts(seed, NEW_TOPICS, kinds, half)
    ]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measured(run: Path) -> list[str]:
    """Lines about each iteration of a run: means over held-out prompts, and the change from the base's with the half of its 95 %
    interval, over the same prompts."""
    measures = {"constraints met": _share_met, "about the topic": about, "score": score}
    lines, base, t = [], dict[str, np.ndarray](), 0
    while (file := run / f"iter_{t}" / "heldout" / "responses.parquet").exists():
        rows = pq.read_table(file, columns=["prompt", "responses"]).to_pylist()
        for name, measure in measures.items():
            # The base has two responses to each prompt.
            found = np.array(
                [np.mean([measure(row["prompt"], text) for text in row["responses"]]) for row in rows]
            )
            change = found - base.setdefault(name, found)
            half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
            lines.append(
                f"iteration {t}: {name} {found.mean():.3f}"
                + (f", {change.mean():+.3f} +- {half:.3f}" if t else "")
            )
        t += 1
    return lines


def _share_met(prompt: str, response: str) -> float:
    kept = list(checked(prompt, response).values())
    return float(np.mean([value == 1.0 for value in kept])) if kept else 1.0


def main(given: Sequence[str] | None = None) -> None:
    """Write the prompts into the folder that --to names, or print what the responses of --run keep."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = flags.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="DIR", help="a new folder for prompts")
    what.add_argument("--run", metavar="OUT", help="a run's directory, whose held-out responses are measured")
    flags.add_argument("--hard", action="store_true", help="with kinds that a small model hardly ever keeps")
    asked = flags.parse_args(given)
    if asked.run is not None:
        lines = measured(Path(asked.run))
        if not lines:
            flags.error(f"--run {asked.run}: no held-out responses are there")
        print("\n".join(lines))
        return
    folder = Path(asked.to)
    if folder.exists():
        flags.error(f"--to {folder} exists; give a new folder")
    write(folder, hard=asked.hard)


if __name__ == "__main__":
    main()

"""Stage 0: prompt files become Prompts, a disjoint set per iteration and a held-out set apart from all."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.records import Prompt, prompt_id
from sppo_jax.tiny import resolve
from sppo_jax.tokens import chat_prompt

CHARACTERS_PER_TOKEN = 100  # a text longer than max_length times this is too long without being tokenised


@dataclass
class PromptSets:
    """`train[t - 1]` are iteration t's prompts. `counts` says what was read, kept and skipped, and why."""

    train: list[list[Prompt]]
    heldout: list[Prompt]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def load(config: Config, tokenizer: Any) -> PromptSets:
    """Prompts of every iteration. No prompt is in two of the sets: held-out first, then iteration by iteration.

    A row that is empty, not text, repeated, held out or over-long is skipped and counted, never cut.
    Raises BadInput when a file is missing or leaves no prompts.
    """
    sets, seen = PromptSets([], []), dict[int, str]()
    texts = _distinct(config.prompts.heldout, config, "heldout", seen, sets.counts)
    sets.heldout = _tokenised(texts, config, tokenizer, "heldout", sets.counts, config.eval.prompts)
    if not sets.heldout:
        raise BadInput(f"prompts.heldout={config.prompts.heldout} leaves no held-out prompts: {sets.counts}")
    source, limit = config.prompts.source, config.prompts.per_iteration
    if "{iteration}" in source:
        for t in range(1, config.iterations + 1):
            name = f"iteration {t}"
            texts = _distinct(source.replace("{iteration}", str(t)), config, name, seen, sets.counts)
            order = [texts[i] for i in np.random.default_rng((config.seed, t)).permutation(len(texts))]
            sets.train.append(_tokenised(order, config, tokenizer, name, sets.counts, limit))
    else:
        texts = _distinct(source, config, "train", seen, sets.counts)
        order = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))]
        pool = _tokenised(order, config, tokenizer, "train", sets.counts, limit * config.iterations)
        sets.train = [pool[limit * t : limit * (t + 1)] for t in range(config.iterations)]
    for t, prompts in enumerate(sets.train, 1):
        if not prompts:
            raise BadInput(f"prompts.source={source} leaves no prompts for iteration {t}: {sets.counts}")
    return sets


def locate(source: str) -> Path:
    """The file that `embedded:NAME` or `jsonl:PATH` names."""
    scheme, _, name = source.partition(":")
    if scheme not in ("embedded", "jsonl") or not name:
        raise BadInput(f"prompt source {source!r}: give jsonl:PATH (a file of JSON rows)")
    path = resolve(source) if scheme == "embedded" else Path(name)
    if not path.is_file():
        raise BadInput(f"prompt source {source!r}: no such file")
    if not os.access(path, os.R_OK):
        raise BadInput(f"prompt source {source!r}: cannot be read")
    return path


def _distinct(
    source: str, config: Config, name: str, seen: dict[int, str], counts: dict[str, dict[str, int]]
) -> list[str]:
    """Texts of a file that no set before it holds, in the file's order."""
    count: Counter[str] = Counter()
    texts = []
    for row in _rows(locate(source)):
        text = row.get(config.prompts.column) if isinstance(row, dict) else None
        if row is None:
            count["not_json"] += 1
        elif not isinstance(text, str):
            count["no_text"] += 1
        elif not text.strip():
            count["empty"] += 1
        elif not _encodable(text):
            count["not_unicode"] += 1
        elif (identity := prompt_id(text)) in seen:
            count["repeated" if seen[identity] == name else f"in_{seen[identity].replace(' ', '_')}"] += 1
        else:
            seen[identity] = name
            texts.append(text)
        count["rows"] += 1
    counts[name] = dict(count)
    return texts


def _rows(path: Path) -> Iterator[Any]:
    """Parsed rows; None for one that is not JSON. Blank lines are no rows."""
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _encodable(text: str) -> bool:
    """JSON can spell lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tokenised(
    texts: list[str], config: Config, tokenizer: Any, name: str, counts: dict[str, dict[str, int]], limit: int
) -> list[Prompt]:
    """The first `limit` texts that are short enough."""
    prompts: list[Prompt] = []
    too_long = 0
    for text in texts:
        if len(prompts) == limit:
            break
        if len(text) > CHARACTERS_PER_TOKEN * config.prompts.max_length:
            too_long += 1
            continue
        prompt = chat_prompt(tokenizer, text)
        if len(prompt.ids) > config.prompts.max_length:
            too_long += 1
        else:
            prompts.append(prompt)
    counts[name] |= {"too_long": too_long} if too_long else {}
    counts[name]["kept"] = len(prompts)
    return prompts

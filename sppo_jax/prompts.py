"""Stage 0: rows of a source become Prompts, a disjoint set per iteration and a held-out set apart from all."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.records import Prompt, prompt_id
from sppo_jax.text import rows
from sppo_jax.text.chat_template import chat_prompt
from sppo_jax.text.rows import Source

CHARACTERS_PER_TOKEN = 100  # a text longer than max_length times this is too long without being tokenised


@dataclass
class PromptSets:
    """Prompts by iteration, iteration t's in `train[t - 1]`, and for each set the rows read, kept and skipped by reason.

    `heldout` are the first held-out prompts that are short enough; `heldout_ids` are the ids of all held-out texts.
    """

    train: list[list[Prompt]]
    heldout: list[Prompt]
    heldout_ids: frozenset[int] = frozenset()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def load(config: Config, tokenizer: Any) -> PromptSets:
    """The prompts of all iterations. A prompt is in one set only: the first of held-out, iteration 1, 2, ... that has it.

    A row that is empty, not text, repeated, held out or over-long is skipped and counted, never cut. With
    pairs.source nothing is sampled, and `train` is empty. Raises BadInput if a source cannot be read or leaves no
    prompts.
    """
    p, sets, seen = config.prompts, PromptSets([], []), dict[int, str]()
    texts = _distinct(heldout_source(config), p.column, "heldout", seen, sets.counts)
    sets.heldout_ids = frozenset(seen)
    sets.heldout = _tokenised(texts, config, tokenizer, "heldout", sets.counts, config.eval.prompts)
    if not sets.heldout:
        raise BadInput(f"prompts.heldout={p.heldout} leaves no held-out prompts: {sets.counts}")
    if config.pairs.source:
        return sets
    source, limit = Source("prompts.source", p.source, p.split), p.per_iteration
    if source.by_iteration:
        for t in range(1, config.iterations + 1):
            name = f"iteration {t}"
            texts = _distinct(source.at(t), p.column, name, seen, sets.counts)
            order = [texts[i] for i in np.random.default_rng((config.seed, t)).permutation(len(texts))]
            sets.train.append(_tokenised(order, config, tokenizer, name, sets.counts, limit))
    else:
        texts = _distinct(source, p.column, "train", seen, sets.counts)
        order = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))]
        pool = _tokenised(order, config, tokenizer, "train", sets.counts, limit * config.iterations)
        sets.train = [pool[limit * t : limit * (t + 1)] for t in range(config.iterations)]
    for t, prompts in enumerate(sets.train, 1):
        if not prompts:
            raise BadInput(f"{source} leaves no prompts for iteration {t}: {sets.counts}")
    return sets


def heldout_source(config: Config) -> Source:
    """The source of the held-out set, which all iterations share. Raises BadInput if it names one per iteration."""
    source = Source("prompts.heldout", config.prompts.heldout, config.prompts.heldout_split)
    if source.by_iteration:
        raise BadInput(
            f"{source}: the held-out prompts are the same for every iteration, so {rows.PLACEHOLDER} cannot be in "
            "their name or split; join splits with +"
        )
    return source


def _distinct(
    source: Source, column: str, name: str, seen: dict[int, str], counts: dict[str, dict[str, int]]
) -> list[str]:
    """The texts of a source that no earlier set has, in the source's order."""
    count: Counter[str] = Counter()
    texts = []
    for row in rows.rows(source, [column]):
        text = None if row is None else _instruction(row.get(column))
        if row is None:
            count["not_json"] += 1
        elif text is None:
            count["no_text"] += 1
        elif not text.strip():
            count["empty"] += 1
        elif not rows.is_unicode(text):
            count["not_unicode"] += 1
        elif (identity := prompt_id(text)) in seen:
            count["repeated" if seen[identity] == name else f"in_{seen[identity].replace(' ', '_')}"] += 1
        else:
            seen[identity] = name
            texts.append(text)
        count["rows"] += 1
    counts[name] = dict(count)
    return texts


def _instruction(value: Any) -> str | None:
    """The instruction in a column's value: a text itself, or a conversation's first message if it is the user's."""
    if isinstance(value, str):
        return value
    conversation = rows.messages(value)
    return conversation[0][1] if conversation and conversation[0][0] == "user" else None


def _tokenised(
    texts: list[str], config: Config, tokenizer: Any, name: str, counts: dict[str, dict[str, int]], limit: int
) -> list[Prompt]:
    """The first `limit` prompts that have at most prompts.max_length tokens; longer ones are counted as too_long."""
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

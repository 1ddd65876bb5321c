"""Stage 0: rows of a source become Prompts, a disjoint set per iteration and a held-out set apart from all."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sppo_jax import files
from sppo_jax.config import Config, Prompts
from sppo_jax.errors import BadInput
from sppo_jax.records import Prompt, prompt_id
from sppo_jax.text import conversations, rows, skipped
from sppo_jax.text.answers import Answers
from sppo_jax.text.chat_template import Refused, chat_prompt
from sppo_jax.text.conversations import is_unicode
from sppo_jax.text.source import PLACEHOLDER, Row, Source, shown_name

CHARACTERS_PER_TOKEN = 100  # a text longer than max_length times this is too long without being tokenised
SHARE = 10  # one prompt in so many is held out where prompts.heldout is empty

Counts = dict[str, dict[str, int]]
Reader = Callable[[Row], tuple[str, bool] | str]


@dataclass
class PromptSets:
    """Prompts by iteration, iteration t's in `train[t - 1]`, and for each set the rows read, kept and skipped by reason.

    `heldout` are the first held-out prompts that are short enough; `heldout_ids` are the ids of all held-out texts.
    `notes` are sentences about the sets for the user; `answers` the responses of responses.source.
    """

    train: list[list[Prompt]]
    heldout: list[Prompt]
    heldout_ids: frozenset[int] = frozenset()
    counts: Counts = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    answers: Answers | None = None


def load(config: Config, tokenizer: Any, answers: Answers | None = None) -> PromptSets:
    """The prompts of all iterations. A prompt is in one set only: the first of held-out, iteration 1, 2, ... that has it.

    Without a source of held-out prompts a share of the prompts of iteration 1 (of the whole pool where there is one) is
    held out. A row that is empty, not text, repeated, held out, over-long or refused by the chat template is skipped and
    counted, never cut. With pairs.source nothing is sampled, and `train` is empty. With responses.source the prompts are its
    own, and `answers` collects the responses to the training prompts. Raises BadInput if a source cannot be read or
    leaves no prompts.
    """
    sets, seen = PromptSets([], [], answers=answers), dict[int, str]()
    if config.prompts.heldout:
        source = heldout_source(config)
        texts = _distinct(source, config, "heldout", seen, sets)
        sets.heldout_ids = frozenset(seen)
        sets.heldout = _tokenised(texts, config, tokenizer, "heldout", sets.counts, config.eval.prompts)
        if not sets.heldout:
            raise _nothing(source, "held-out prompts", config, tokenizer, sets.counts["heldout"], texts)
    elif config.prompts.heldout_split != Prompts.heldout_split:
        raise BadInput(
            f"prompts.heldout_split={config.prompts.heldout_split} is read with prompts.heldout only, which is empty: set "
            "that to the held-out prompts' source, or the split to its default, test"
        )
    if not config.pairs.source:
        _load_train(config, tokenizer, seen, sets)
    elif not config.prompts.heldout:
        source = Source("pairs.source", config.pairs.source, config.pairs.split).at(1)
        texts = _distinct(source, config, "given pairs 1", seen, sets)
        _hold_out(texts, source, config, tokenizer, "given pairs 1", seen, sets)
        del sets.counts["given pairs 1"]  # the pairs' own reader counts their rows
    for name, count in sets.counts.items():
        sets.notes += skipped.notes(name, count, _where(config))
    return sets


def _load_train(config: Config, tokenizer: Any, seen: dict[int, str], sets: PromptSets) -> None:
    """Fill `sets.train`, and the held-out set where it has no source of its own."""
    p = config.prompts
    source, limit, share = Source("prompts.source", p.source, p.split), p.per_iteration, not p.heldout
    if (given := config.responses).source:
        source = Source("responses.source", given.source, given.split)
    if source.by_iteration:
        for t in range(1, config.iterations + 1):
            name, own = f"iteration {t}", source.at(t)
            texts = distinct = _distinct(own, config, name, seen, sets)
            if share and t == 1:
                texts = _hold_out(texts, own, config, tokenizer, name, seen, sets)
            order = [texts[i] for i in np.random.default_rng((config.seed, t)).permutation(len(texts))]
            sets.train.append(_tokenised(order, config, tokenizer, name, sets.counts, limit, sets.answers))
            if not sets.train[-1]:
                what = f"prompts for iteration {t}"
                raise _nothing(own, what, config, tokenizer, sets.counts[name], distinct)
        return
    texts = distinct = _distinct(source, config, "train", seen, sets)
    if share:
        texts = _hold_out(texts, source, config, tokenizer, "train", seen, sets)
    order = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))]
    pool = _tokenised(order, config, tokenizer, "train", sets.counts, limit * config.iterations, sets.answers)
    sets.train = [pool[limit * t : limit * (t + 1)] for t in range(config.iterations)]
    for t, prompts in enumerate(sets.train, 1):
        what = f"prompts for iteration {t}"
        if not pool:
            raise _nothing(source, what, config, tokenizer, sets.counts["train"], distinct)
        if not prompts:
            others = skipped.described(sets.counts["train"], _where(config))
            each, most = max(1, len(pool) // config.iterations), min(config.iterations, len(pool))
            raise BadInput(
                f"{source} leaves no {what}: the earlier ones take all its {len(pool)} prompts"
                + (f" ({others})" if others else "")
                + f"; give more, or set prompts.per_iteration to {each}"
                + (f" and iterations to {most}" if most < config.iterations else "")
                + ", in a new --out if this one has begun"
            )


def heldout_source(config: Config) -> Source:
    """The source of the held-out set, which all iterations share. Raises BadInput if it names one per iteration."""
    source = Source("prompts.heldout", config.prompts.heldout, config.prompts.heldout_split)
    if source.by_iteration:
        raise BadInput(
            f"{source}: the held-out prompts are the same for every iteration, so {PLACEHOLDER} cannot be in "
            "their name or split; join splits with +"
        )
    return source


def _hold_out(
    texts: list[str],
    source: Source,
    config: Config,
    tokenizer: Any,
    name: str,
    seen: dict[int, str],
    sets: PromptSets,
) -> list[str]:
    """Hold out about a tenth of the set `name`, at most eval.prompts, and return the other texts.

    Which texts are held out depends on the texts alone: not on their order, the seed, or the number of iterations.
    """
    count = sets.counts[name]
    if not texts:
        raise _nothing(source, "prompts", config, tokenizer, count, texts)
    if len(texts) == 1:
        others = skipped.described(count, _where(config))
        raise BadInput(
            f"{source} has one distinct prompt{f' ({others})' if others else ''}, of which none can be held out for evaluation; give more, or name "
            "other prompts in prompts.heldout (jsonl:PATH)"
        )
    order = sorted(texts, key=lambda text: files.sha256_text(str(prompt_id(text))))
    limit = min(config.eval.prompts, max(1, len(texts) // SHARE))
    tried: Counts = {"heldout": {}}
    sets.heldout = _tokenised(order, config, tokenizer, "heldout", tried, limit)
    if not sets.heldout:
        raise _nothing(source, "held-out prompts", config, tokenizer, count | tried["heldout"], texts)
    number = len(sets.heldout)
    sets.heldout_ids = frozenset(prompt.prompt_id for prompt in sets.heldout)
    sets.counts["heldout"] = {f"held_out_of_{source.knob.replace('.', '_')}": number, "kept": number}
    count["in_heldout"] = number
    seen |= dict.fromkeys(sets.heldout_ids, "heldout")
    sets.notes.append(
        f"prompts.heldout is empty: {number} of the {len(texts)} prompts of {source} {'is' if number == 1 else 'are'} held out "
        "for evaluation, and not trained on"
    )
    return [text for text in texts if prompt_id(text) not in sets.heldout_ids]


def _distinct(source: Source, config: Config, name: str, seen: dict[int, str], sets: PromptSets) -> list[str]:
    """The texts of a source that no earlier set has, in the source's order."""
    columns, read = _reader(source, config)
    if sets.answers and source.knob == "responses.source":
        columns, read = sets.answers.read_with(columns, read)
    count: Counter[str] = Counter()
    texts = []
    for row in rows.rows(source, columns):
        found = row if isinstance(row, str) else read(row)
        text, more = ("", False) if isinstance(found, str) else found
        if isinstance(found, str):
            count[found] += 1
        elif conversations.any_empty(text):
            count["empty"] += 1
        elif not is_unicode(text):
            count["not_unicode"] += 1
        elif (identity := prompt_id(text)) in seen:
            count["repeated" if seen[identity] == name else f"in_{seen[identity].replace(' ', '_')}"] += 1
        else:
            seen[identity] = name
            texts.append(text)
            count["more_turns"] += more
            count["template_markers"] += conversations.has_markers(text)
        count["rows"] += 1
    sets.counts[name] = {reason: number for reason, number in count.items() if number}
    note = rows.note(source)
    sets.notes += [note] if note and note not in sets.notes else []
    return texts


def _reader(source: Source, config: Config) -> tuple[list[str], Reader]:
    """The columns of a source in which the prompts are, and the function that finds a row's, or why there is none."""
    if source.knob != "pairs.source":
        column, which = config.prompts.column, config.prompts.turns
        return [column], lambda row: conversations.prompt(row.get(column), which)

    def of_pair(row: Row) -> tuple[str, bool] | str:
        found = conversations.pair(row.get("chosen"), row.get("rejected"))
        return found if isinstance(found, str) else (found[0], False)

    return ["chosen", "rejected"], of_pair


def _tokenised(
    texts: list[str],
    config: Config,
    tokenizer: Any,
    name: str,
    counts: Counts,
    limit: int,
    answers: Answers | None = None,
) -> list[Prompt]:
    """The first `limit` prompts that the template takes, of at most prompts.max_length tokens, and with `answers` enough responses.

    The others before them are counted, by reason.
    """
    prompts: list[Prompt] = []
    found: Counter[str] = Counter()
    for text in texts:
        if len(prompts) == limit:
            break
        if len(text) > CHARACTERS_PER_TOKEN * config.prompts.max_length:
            found["too_long"] += 1
            continue
        try:
            prompt = chat_prompt(tokenizer, text)
        except Refused:
            found["refused"] += 1
            continue
        if len(prompt.ids) > config.prompts.max_length:
            found["too_long"] += 1
        elif answers is None or answers.take(prompt, found):
            prompts.append(prompt)
    counts[name] |= found
    counts[name]["kept"] = len(prompts)
    return prompts


def _where(config: Config) -> str:
    return f" in column {config.prompts.column!r}"


def _nothing(
    source: Source, what: str, config: Config, tokenizer: Any, count: dict[str, int], texts: Sequence[str]
) -> BadInput:
    """The line about a source that leaves no `what`, with the knob that helps. `texts`: its distinct texts."""
    reason = skipped.commonest(count)
    advice = "give other prompts" if reason else "is it empty?"
    if source.knob == "pairs.source":
        return skipped.nothing(source, what, count, where=" in 'chosen' or 'rejected'")
    if reason == "too_long":
        shortest = _shortest(texts, tokenizer)
        advice = f"raise prompts.max_length={config.prompts.max_length}: a short one has {shortest} tokens"
    elif reason in ("no_text", "not_only_text", "begins_with_system", "begins_with_assistant", "empty"):
        names = [shown_name(n) for n in rows.columns_of_text(source) if n != config.prompts.column]
        first = reason.startswith("begins_with")
        advice = skipped.ADVICE[reason] if first else "no other column holds text: look at its rows"
        if names and reason != "begins_with_system":
            advice = f"set prompts.column to a column that holds text: {', '.join(names)}"
    elif reason == "few_responses":
        advice = f"lower sampling.responses={config.sampling.responses}, or set responses.column to a list of responses"
    elif reason == "in_heldout":
        advice = "name other prompts in prompts.heldout, or leave it empty to hold out a share of these"
    elif reason in ("not_json", "not_object"):
        advice = f'write one object per line, such as {{"{config.prompts.column}": "..."}}'
    elif reason in ("unknown_role", "no_user", "refused"):
        advice = skipped.ADVICE[reason]
    return skipped.nothing(source, what, count, where=_where(config), advice=advice)


def _shortest(texts: Sequence[str], tokenizer: Any) -> int:
    """The number of tokens of the shortest text that the chat template takes."""
    for text in sorted(texts, key=len):
        with contextlib.suppress(Refused):
            return len(chat_prompt(tokenizer, text).ids)
    return 0

"""Responses made elsewhere: a column with the list of a prompt's responses becomes what is judged and trained on."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sppo_jax.config import Config
from sppo_jax.records import Prompt, Responses, prompt_id
from sppo_jax.text import conversations
from sppo_jax.text.chat_template import written_ids
from sppo_jax.text.conversations import is_unicode
from sppo_jax.text.messages import written
from sppo_jax.text.source import Row

Reader = Callable[[Row], tuple[str, bool] | str]  # of a row's prompt (sppo_jax.prompts)


def responses(value: Any) -> list[str] | str:
    """The responses in a column's value, or the reason why its row has none, which is the name of a count."""
    if not isinstance(value, list) or not value:
        return "no_responses"
    if not all(isinstance(text, str) for text in value):
        return "not_texts"
    return value if all(map(is_unicode, value)) else "not_unicode"


def whole_prompt(value: Any) -> str:
    """The prompt in a column's value as one text (text.messages): a text, or a conversation, of which every turn is read.

    Raises Unusable, with the name of a count, unless it can be shown to a judge.
    """
    turns = conversations.turns(value)
    if not turns:
        text = value if isinstance(value, str) else None
        if text is None:
            raise Unusable("no_text")
    else:
        if any(turn.role not in conversations.KNOWN for turn in turns):
            raise Unusable("unknown_role")
        if reason := next((turn.reason for turn in turns if turn.text is None), ""):
            raise Unusable(reason)
        if turns[-1].role != "user":
            raise Unusable("ends_with_assistant")
        text = written([{"role": turn.role, "content": str(turn.text)} for turn in turns])
    if not text.strip() or (turns and not str(turns[-1].text).strip()):
        raise Unusable("empty")
    if not is_unicode(text):
        raise Unusable("not_unicode")
    return text


class Unusable(Exception):
    """A row that cannot be used; the message is the name of the count for it."""


class Answers:
    """The responses of responses.source, K = sampling.responses to each prompt that is trained on.

    They are known as text only: their ids are what the policy's tokenizer makes of the text in the chat template, with the
    end of turn. This is the one place where the ids that are judged and trained on are not ids that were sampled.
    """

    def __init__(self, config: Config, tokenizer: Any, eos: tuple[int, ...], positions: int):
        """`positions`: of the model, into which a prompt and each response have to fit."""
        self._column, self._k = config.responses.column, config.sampling.responses
        self._tokenizer, self._eos, self._positions = tokenizer, eos, positions
        self._lists: dict[int, list[Any]] = {}  # by prompt_id, as the rows have them
        self._taken: dict[int, tuple[list[str], list[list[int]]]] = {}

    def read_with(self, columns: Sequence[str], read: Reader) -> tuple[list[str], Reader]:
        """Columns and a reader of prompts that keeps the responses beside each, those of a prompt's first row."""

        def reading(row: Row) -> tuple[str, bool] | str:
            found = read(row)
            if not isinstance(found, str) and is_unicode(found[0]):
                value = row.get(self._column)
                self._lists.setdefault(prompt_id(found[0]), value if isinstance(value, list) else [])
            return found

        return [*dict.fromkeys([*columns, self._column])], reading

    def take(self, prompt: Prompt, counts: Counter[str]) -> bool:
        """Take the first K usable responses to a prompt, if there are so many; `counts` says what was left out.

        A response is usable if it is a text, not empty, and fits into the model's positions after the prompt.
        """
        given = self._lists.pop(prompt.prompt_id, [])
        room = self._positions - len(prompt.ids)
        texts: list[str] = []
        ids: list[list[int]] = []
        tried = 0
        for text in given:
            if len(texts) == self._k:
                break
            tried += 1
            if not isinstance(text, str) or not text.strip() or not is_unicode(text):
                continue
            if len(written_to := written_ids(self._tokenizer, text, self._eos)) <= room:
                texts.append(text)
                ids.append(written_to)
        if len(texts) < self._k:
            counts["few_responses"] += 1
            return False
        left_out = {"unusable_responses": tried - self._k, "more_responses": int(tried < len(given))}
        counts.update({name: number for name, number in left_out.items() if number})
        self._taken[prompt.prompt_id] = texts, ids
        return True

    def rows(self, train: Sequence[Sequence[Prompt]]) -> list[list[Responses]]:
        """The responses to each iteration's prompts, as stage 1 would have sampled them. Their log-probs are NaN."""
        self._lists.clear()
        return [[self._row(prompt) for prompt in part] for part in train]

    def _row(self, prompt: Prompt) -> Responses:
        texts, ids = self._taken[prompt.prompt_id]
        nothing = [float("nan")] * self._k
        return Responses(prompt.prompt_id, prompt.text, prompt.ids, ids, texts, ["stop"] * self._k, nothing)

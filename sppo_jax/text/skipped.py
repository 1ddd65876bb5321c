"""Why rows are skipped, in words: the line about a source that leaves nothing to train or evaluate on."""

from collections.abc import Mapping

from sppo_jax.errors import BadInput
from sppo_jax.text.source import Source

# A count of rows, in words that follow their number.
MEANS = {
    "not_json": "are not JSON",
    "not_object": "are JSON, but not objects with columns",
    "no_text": "have no text",
    "not_only_text": "have images or other parts beside text",
    "begins_with_system": "have a system message first, which prompts.turns=first does not take",
    "begins_with_assistant": "have a response first, and no prompt before it",
    "no_user": "have no message of the user",
    "unknown_role": "have a message of an unknown role",
    "refused": "have roles that the policy's chat template refuses, or refuses in this order",
    "empty": "are empty",
    "empty_chosen": "have an empty chosen response",
    "not_unicode": "are not Unicode",
    "repeated": "are repeated",
    "in_heldout": "are held out",
    "too_long": "are too long",
    "other_turns": "have other turns than a prompt and its response",
    "other_prompt": "have another prompt in rejected than in chosen",
    "identical": "have two equal responses",
    "ends_with_assistant": "have no message of the user's last",
    "no_responses": "have no list of responses",
    "not_texts": "have a response that is not text",
    "few_responses": "have too few responses that can be used",
    "bad_probability": "have a probability that is missing or outside [0, 1]",
}
# Other counts of given responses.
ALSO = {
    "unusable_responses": "{} responses cannot be used",
    "more_responses": "{} have more responses than are used",
}
EXPECTED = ("repeated", "in_heldout")  # counts that are no faults of the rows
# What to do about rows that were skipped for a reason, where a note says that there are many.
ADVICE = {
    "not_json": "write one object per line",
    "not_object": "write one object per line",
    "no_text": "is it the right column?",
    "not_only_text": "only prompts that are text alone are read",
    "begins_with_system": "set prompts.turns to last",
    "begins_with_assistant": "put a message of the user's before it",
    "no_user": "a conversation is read up to the user's last message",
    "refused": "Gemma's takes no system message, Mistral's wants user and assistant to take turns: change these rows, or take a "
    "policy whose template takes them",
    "unknown_role": "a message has role (system, user, assistant) and content, or from (human, gpt) and value",
    "few_responses": "lower sampling.responses, or look at responses.column",
    "too_long": "raise prompts.max_length, or give shorter prompts",
    "bad_probability": "probabilities are numbers from 0 to 1",
}
MANY = 10  # more than one row in so many is worth a note


def notes(name: str, counts: Mapping[str, int], where: str) -> list[str]:
    """Return sentences for the user about the rows of the set `name`: many that were skipped, and odd prompts.

    Rows that other rows or sets have already are not faults: they are not among the many.
    """
    found = []
    faults = {key: number for key, number in counts.items() if key in MEANS and key not in EXPECTED}
    if sum(faults.values()) * MANY > counts.get("rows", 0):
        said = described(faults | {"rows": counts.get("rows", 0)}, where)
        advice = ADVICE.get(commonest(faults), "look at these rows")
        found.append(f"prompts, {name}: many rows are skipped: {said}; {advice}")
    if more := counts.get("more_turns"):
        found.append(
            f"prompts, {name}: {more} of the prompts begin conversations with more turns of the user: only the first turn is "
            "used (prompts.turns=first)"
        )
    if marked := counts.get("template_markers"):
        found.append(
            f"prompts, {name}: {marked} of the prompts hold a chat template's markers, such as <|im_start|>, [INST] or Human: "
            "... Assistant:, or keys of messages: they are taken as text, inside the policy's own template; give lists of "
            "messages instead"
        )
    return found


def summary(name: str, counts: Mapping[str, int]) -> str:
    """Return the line about the set `name`: how many of its rows are used, and how many are not, by reason."""
    reasons = [_said(key, number) for key, number in sorted(counts.items()) if _meaning(key)]
    reasons += [words.format(counts[key]) for key, words in ALSO.items() if key in counts]
    of = f" of {counts['rows']} rows" if "rows" in counts else ""
    return "; ".join(
        [f"prompts, {name}: {counts.get('kept', 0)}{of} used", *filter(None, [", ".join(reasons)])]
    )


def nothing(
    source: Source, what: str, counts: Mapping[str, int], *, where: str = "", advice: str = ""
) -> BadInput:
    """Return the line about a source whose rows leave no `what`: the counts of skipped rows in words, and advice.

    `where` follows "have no text", such as " in column 'prompt'".
    """
    words = described(counts, where)
    end = f"; {advice}" if advice else ""
    return BadInput(f"{source} leaves no {what}: {words or 'it has no rows'}{end}")


def described(counts: Mapping[str, int], where: str = "") -> str:
    """Return "of 40 rows 40 have no text in column 'prompt' (no_text)" and the like; "" if no row was skipped."""
    shown = []
    for name, number in sorted(counts.items(), key=lambda item: -item[1]):
        if _meaning(name):
            shown.append(f"{_said(name, number)}{where if name == 'no_text' else ''} ({name})")
    rows = counts.get("rows", 0)
    return f"of {rows} row{'' if rows == 1 else 's'} {', '.join(shown)}" if shown else ""


def commonest(counts: Mapping[str, int]) -> str:
    """Return the name of the count of most skipped rows; "" if none was skipped.

    Repeated rows come last: what happened to the first of them is the reason.
    """
    names = (name for name in counts if _meaning(name))
    return max(names, key=lambda name: (name != "repeated", counts[name]), default="")


def _said(name: str, number: int) -> str:
    """A count of skipped rows in words: "1 is too long", "3 are repeated"."""
    verb, rest = _meaning(name).split(" ", 1)
    return f"{number} {({'are': 'is', 'have': 'has'}[verb]) if number == 1 else verb} {rest}"


def _meaning(name: str) -> str:
    if name.startswith("in_iteration_"):
        return f"are in iteration {name.rpartition('_')[2]}"
    return MEANS.get(name, "")

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
    "begins_with_system": "have a system message first, which is not supported",
    "begins_with_assistant": "have a response first, and no prompt before it",
    "unknown_role": "have a message of an unknown role",
    "empty": "are empty",
    "empty_chosen": "have an empty chosen response",
    "not_unicode": "are not Unicode",
    "repeated": "are repeated",
    "in_heldout": "are held out",
    "too_long": "are too long",
    "other_turns": "have other turns than a prompt and its response",
    "other_prompt": "have another prompt in rejected than in chosen",
    "identical": "have two equal responses",
    "bad_probability": "have a probability that is missing or outside [0, 1]",
}


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
        if meaning := _meaning(name):
            verb, rest = meaning.split(" ", 1)
            verb = {"are": "is", "have": "has"}[verb] if number == 1 else verb
            shown.append(f"{number} {verb} {rest}{where if name == 'no_text' else ''} ({name})")
    rows = counts.get("rows", 0)
    return f"of {rows} row{'' if rows == 1 else 's'} {', '.join(shown)}" if shown else ""


def commonest(counts: Mapping[str, int]) -> str:
    """Return the name of the count of most skipped rows; "" if none was skipped.

    Repeated rows come last: what happened to the first of them is the reason.
    """
    names = (name for name in counts if _meaning(name))
    return max(names, key=lambda name: (name != "repeated", counts[name]), default="")


def _meaning(name: str) -> str:
    if name.startswith("in_iteration_"):
        return f"are in iteration {name.rpartition('_')[2]}"
    return MEANS.get(name, "")

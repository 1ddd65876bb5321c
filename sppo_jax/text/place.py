"""The place of an answer: whether the end of a rendered prompt reaches it, and nothing ends the answer before it begins."""

import re

# A thought that a template adds to an answer without one; the policy samples its own.
EMPTY_THOUGHT = re.compile(r"[<\[]([^<>\[\]/\s]+)[>\]]\s*[<\[]/\1[>\]]")


def fault(given: str, plain: str, needed: str | None, ends: re.Pattern[str]) -> str:
    """Return what is wrong with a prompt and what to do, to follow "ends the prompt"; "" where an answer can follow it.

    `given` is what the template writes after the last message, with its generation header, `plain` the same without, and
    `needed` what it writes between the message and an answer; None if it does not render answers. `ends` matches the tokens
    that end a response. The prompt has to begin with `needed`, up to white space and an empty thought, and may go further,
    as into a thought; it has no end that `needed` has not. Without `needed`, it only must not finish with an end.
    """
    if needed is None:
        last = next((end.group() for end in ends.finditer(given) if not given[end.end() :].strip()), "")
        return f"with {last!r}, which ends a response: do not write it after a user's message" if last else ""
    if not "".join(given.split()).startswith("".join(EMPTY_THOUGHT.sub("", needed).split())):
        return _unreached(given, plain, needed)
    if len(found := ends.findall(given)) > len(ends.findall(needed)):
        return (
            f"with {found[-1]!r}, which ends a response, and which it does not write before an answer: write it only after "
            "an assistant's message"
        )
    return ""


def _unreached(given: str, plain: str, needed: str) -> str:
    """Return what to do about a prompt that does not reach the place of an answer."""
    early = "before the place where it puts an answer; "
    if needed.startswith(given):
        return f"{early}end it with {{% if add_generation_prompt %}}{{{{ {needed.removeprefix(given)!r} }}}}{{% endif %}}"
    same = 0  # characters with which all three begin
    while len({text[: same + 1] for text in (plain, given, needed)}) == 1 and same < len(given):
        same += 1
    return (
        f"{early}its header {given[same:]!r} (of add_generation_prompt) differs from {needed[same:]!r}, which it writes "
        "before an answer: make the two equal"
    )

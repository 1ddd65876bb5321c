"""The command that talks to a policy: lines of a terminal or a pipe → conversations → the sampler, with K = 1 → text.

`python -m sppo_jax.chat --policy DIR`. Only responses go to standard output.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sppo_jax import command
from sppo_jax import config as configuration
from sppo_jax.command import Flags, call, printable
from sppo_jax.config import EMBEDDED, Sampling
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.records import Prompt
from sppo_jax.settings import checks, mapping
from sppo_jax.text import chat_template
from sppo_jax.text.messages import Message, written

# jax and modules that import it come in the functions, after the flags are checked: --help and bad flags need no jax.
if TYPE_CHECKING:
    from sppo_jax.sampler import Sampler

RESET, QUIT = "/reset", "/quit"
EXAMPLE = "Where does the fox live?"  # of the embedded prompts
LONGEST = 512  # tokens of a response, if the policy's context has at least twice as many positions


def main(words: Sequence[str]) -> None:
    """Print a response to each line of the input until it ends."""
    args = _flags(words)
    conversation = Conversation(_sampler(args), args.seed)
    for line in _lines():
        if line == RESET:
            conversation.forget()
        else:
            print(printable(conversation.respond(line)), flush=True)


def _flags(words: Sequence[str]) -> argparse.Namespace:
    """The parsed flags. Raises BadInput for one that is out of its range."""
    flags = Flags(
        "sppo_jax.chat",
        "Talk to a policy, one message per line, on a terminal or through a pipe.",
        f"{RESET} forgets the conversation, {QUIT} or the end of the input ends it.",
    )
    flags.add_argument(
        "--policy", required=True, metavar="DIR|OWNER/NAME", help="Hugging Face directory or hub name"
    )
    flags.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    flags.add_argument("--top-p", type=float, default=0.9, help="nucleus mass, in (0, 1] (default: 0.9)")
    flags.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"largest number of tokens of a response (default: {LONGEST}, or half the context if that is less)",
    )
    flags.add_argument(
        "--seed", type=int, default=0, help="equal seeds give equal responses to equal input (default: 0)"
    )
    flags.add_argument(
        "--template",
        default="",
        metavar="{NAME: VALUE}",
        help="options of the chat template, such as '{enable_thinking: false}' (model.template of the policy's run)",
    )
    args = flags.read(words)
    args.template = mapping.read(args.template, "--template")
    knobs = {knob.key: knob.range for knob in configuration.knobs()}
    for flag, value, key in (
        ("--temperature", args.temperature, "sampling.temperature"),
        ("--top-p", args.top_p, "sampling.top_p"),
        ("--max-new-tokens", args.max_new_tokens, "sampling.max_new_tokens"),
        ("--seed", args.seed, "seed"),
    ):
        accepted = knobs[key]
        if value is not None and accepted is not None and value not in accepted:
            raise BadInput(f"{flag} {value}: must be {checks.bounds(accepted, value)}")
    return args


class Conversation:
    """The messages so far and the policy. A response depends on these, the seed and the number of earlier responses alone."""

    def __init__(self, sampler: "Sampler", seed: int, say: Callable[[str], None] = command.say):
        """`say` is called with each line about messages that are forgotten for lack of room."""
        self.sampler, self.seed, self.say = sampler, seed, say
        self.history: list[Message] = []
        self.responses = 0

    def forget(self) -> None:
        """Forget all messages."""
        self.history.clear()

    def respond(self, text: str) -> str:
        """Return the policy's response to `text`, and keep both. Empty, with a line to `say`, if `text` alone is too long."""
        messages = [*self.history, {"role": "user", "content": text}]
        ids, dropped = self._fitting(messages)
        if not ids:
            self.say(
                f"this message alone leaves no room for a response in {self._room()} tokens; it is forgotten"
            )
            return ""
        if dropped:
            self.say(
                f"the oldest {dropped} messages no longer fit into {self._room()} tokens and are forgotten"
            )
        # The random key is folded from the prompt's text: here the whole conversation.
        prompt = Prompt(written(messages[dropped:]), ids)
        (found,) = self.sampler.generate([prompt], seed=self.seed, iteration=self.responses)
        self.responses += 1
        self.history = [*messages[dropped:], {"role": "assistant", "content": found.responses[0]}]
        return found.responses[0]

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """Ids of the latest messages that leave room for a response, and the number of older messages that are dropped.

        No ids if even the last message leaves no room. Messages are dropped in pairs: templates require a user's first.
        """
        for dropped in range(0, len(messages), 2):
            ids = chat_template.conversation(self.sampler.tokenizer, messages[dropped:])
            if len(ids) <= self._room():
                return ids, dropped
        return [], 0

    def _room(self) -> int:
        """The largest number of tokens that a conversation may have before a response."""
        return self.sampler.architecture.max_positions - self.sampler.sampling.max_new_tokens


def _sampler(args: argparse.Namespace) -> "Sampler":
    """A sampler of the policy that --policy names. Files that are quick to check are read before the weights."""
    names.check_export(args.policy)
    names.check(args.policy)
    command.say(f"loading {args.policy} ...")
    if args.policy.startswith(EMBEDDED):
        command.say(
            f"warning: {args.policy} is a toy that knows only the embedded prompts, such as {EXAMPLE!r}"
        )
    # Only now, since these import jax.
    from sppo_jax import compilation, sharding
    from sppo_jax.models import hf
    from sppo_jax.sampler import Sampler

    compilation.keep_programs()
    directory = names.fetch(args.policy).directory
    architecture = hf.stored_architecture(directory)
    tokenizer = chat_template.load_tokenizer(directory, args.template)
    eos = chat_template.eos_ids(directory, tokenizer, architecture.vocab)
    longest = args.max_new_tokens or min(LONGEST, architecture.max_positions // 2)
    if longest >= architecture.max_positions:
        raise BadInput(
            f"--max-new-tokens {longest}: the policy has {architecture.max_positions} positions in all; give at most "
            f"{max(1, architecture.max_positions // 2)}, which leaves as many for the conversation"
        )
    mesh = sharding.make_mesh(1, 1, -1, devices=sharding.all_devices(of_this_process=True))
    dtype = sharding.compute_dtype("auto", mesh)
    model = hf.load(directory, mesh=mesh, dtype=dtype, param_dtype=dtype)
    sampling = dataclasses.replace(
        Sampling(),
        responses=1,
        slots=1,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=longest,
    )
    return Sampler(model, tokenizer, sampling, mesh, eos=eos)


def _lines() -> Iterator[str]:
    """The lines of the input that are not blank, until /quit or the end. A terminal shows a prompt, and a line while it waits."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                encoding="utf-8", errors="replace" if stream is sys.stdin else "backslashreplace"
            )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives `input` the arrow keys)
        command.say(f"{RESET} forgets the conversation, {QUIT} ends it")
    first = True
    while True:
        try:
            line = (input("> ") if terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        if line == QUIT:
            return
        if line:
            if terminal and line != RESET:
                command.say(
                    "thinking (the first response compiles the model, which takes a while) …"
                    if first
                    else "thinking …"
                )
                first = False
            yield line


if __name__ == "__main__":
    call(main, resumes=False)

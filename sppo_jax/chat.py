"""Talk to a policy: lines from the terminal or a pipe → conversations → the sampler, with K = 1 → text.

`python -m sppo_jax.chat --policy DIR`; answers are all that goes to standard output.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sppo_jax import command
from sppo_jax.command import Flags, call, printable
from sppo_jax.errors import BadInput

if TYPE_CHECKING:  # jax and its company only once the flags are known to be right
    from sppo_jax.sampler.engine import Sampler

RESET, QUIT = "/reset", "/quit"
LONGEST_ANSWER = 512  # tokens, where the policy's context has room for twice as much

Message = dict[str, str]


def main(words: Sequence[str]) -> None:
    """Answer one message per line until the input ends."""
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
        help=f"longest answer (default: {LONGEST_ANSWER}, at most half the context)",
    )
    flags.add_argument(
        "--seed", type=int, default=0, help="of sampling; equal seeds, equal answers (default: 0)"
    )
    args = flags.read(words)
    if not 0 <= args.temperature < float("inf"):
        raise BadInput(f"--temperature {args.temperature}: must be 0 or above")
    if not 0 < args.top_p <= 1:
        raise BadInput(f"--top-p {args.top_p}: must lie in (0, 1]")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {args.max_new_tokens}: must be above 0")
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed {args.seed}: must lie in [0, 2**32)")
    conversation = Conversation(_sampler(args), args.seed)
    for line in _lines():
        if line == RESET:
            conversation.forget()
        else:
            print(printable(conversation.answer(line)), flush=True)


class Conversation:
    """What was said, and the policy that answers. Each answer is a function of it, the seed and how many went before."""

    def __init__(self, sampler: "Sampler", seed: int, tell: Callable[[str], None] = command.say):
        self.sampler, self.seed, self.tell = sampler, seed, tell
        self.history: list[Message] = []
        self.answered = 0

    def forget(self) -> None:
        self.history.clear()

    def answer(self, text: str) -> str:
        """The policy's answer to `text`; both become history. Empty, with a note, where `text` alone is too long."""
        from sppo_jax.records import Prompt

        said = [*self.history, {"role": "user", "content": text}]
        ids, dropped = self._fitting(said)
        if not ids:
            self.tell(
                f"this message alone leaves no room for an answer in {self._room()} tokens; it is forgotten"
            )
            return ""
        if dropped:
            self.tell(
                f"the oldest {dropped} messages no longer fit into {self._room()} tokens and are forgotten"
            )
        # The random key is folded from the prompt's text: here all of the conversation.
        prompt = Prompt(json.dumps(said[dropped:], sort_keys=True), ids)
        (found,) = self.sampler.generate([prompt], seed=self.seed, iteration=self.answered)
        self.answered += 1
        self.history = [*said[dropped:], {"role": "assistant", "content": found.responses[0]}]
        return found.responses[0]

    def _fitting(self, said: list[Message]) -> tuple[list[int], int]:
        """Ids of the longest end of the conversation that leaves room for an answer, and how many messages it is
        short of; no ids where there is none. Messages go in pairs: templates want a user's first.
        """
        from sppo_jax.text import chat_template

        for dropped in range(0, len(said), 2):
            ids = chat_template.conversation(self.sampler.tokenizer, said[dropped:])
            if len(ids) <= self._room():
                return ids, dropped
        return [], 0

    def _room(self) -> int:
        """Tokens that a conversation may have."""
        return self.sampler.architecture.max_positions - self.sampler.sampling.max_new_tokens


def _sampler(args: Any) -> "Sampler":
    """Everything that is read from the policy's directory, the cheap and the fallible first."""
    import jax

    from sppo_jax import compilation, sharding
    from sppo_jax.config import Sampling
    from sppo_jax.hub import names
    from sppo_jax.models import hf
    from sppo_jax.sampler.engine import Sampler
    from sppo_jax.text import chat_template

    compilation.keep_programs()
    directory = names.fetch(args.policy).directory
    architecture = hf.read_architecture(directory)
    tokenizer = chat_template.load_tokenizer(directory)
    eos = chat_template.eos_ids(directory, tokenizer, architecture.vocab)
    longest = args.max_new_tokens or min(LONGEST_ANSWER, architecture.max_positions // 2)
    if longest >= architecture.max_positions:
        raise BadInput(
            f"--max-new-tokens {longest}: the policy has {architecture.max_positions} positions in all"
        )
    mesh = sharding.make_mesh(1, 1, -1, devices=jax.local_devices())
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
    """Messages, without blank lines, until /quit or the end. On a terminal there is a prompt, and a word of patience."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                encoding="utf-8", errors="replace" if stream is sys.stdin else "backslashreplace"
            )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys in `input`
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
                    "thinking (the first answer compiles the model, which takes a while) …"
                    if first
                    else "thinking …"
                )
                first = False
            yield line


if __name__ == "__main__":
    call(main)

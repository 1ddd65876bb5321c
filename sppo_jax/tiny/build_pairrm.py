"""Build the embedded preference model: a PairRM of 0.4M parameters, trained on noisy comparisons of responses.

It learns the true preference only through sampled verdicts ("the first is better"), in both orders, on responses of far
greater variety than the embedded policy's before training, because self-play drives the policy towards responses that the
judge has not seen.
"""

import json
import math
import random
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import torch as safetensors
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import binary_cross_entropy_with_logits

from sppo_jax.pairrm import files
from sppo_jax.pairrm.format import PREFIXES, Formatter, TextPair
from sppo_jax.pairrm.torch_model import PairRM
from sppo_jax.tiny import build_policy, facts, world
from sppo_jax.tiny.build_fit import fit

SEED = 20240601
STEPS, PAIRS, RATE = 4500, 32, 1.5e-3  # each pair is in its batch twice, once in each order
LESSON = 1500  # first steps, on plain responses: short, and mostly right or wrong
POOL = 32  # batches drawn at once, so that each can have pairs of similar length
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
LETTER_SCORE = -15.0  # log-probability of a single character: below that of every word

CONFIG: dict[str, Any] = {
    "architectures": ["DebertaV2PairRM"],
    "attention_probs_dropout_prob": 0.0,
    "drop_out": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 96,
    "initializer_range": 0.1,  # about 1/sqrt(hidden); with 0.02 learning starts later
    "intermediate_size": 256,
    "layer_norm_eps": 1e-07,
    "max_position_embeddings": 128,
    "max_relative_positions": -1,
    "model_type": "deberta-v2",
    "n_tasks": 1,
    "norm_rel_ebd": "layer_norm",
    "num_attention_heads": 2,  # of 48 channels: with 4 of 24, facts were learned later
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 96,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 32,
    "relative_attention": True,
    "sep_token_id": 2,
    "share_att_key": True,
    "torch_dtype": "float32",
    "type_vocab_size": 0,
}

# --- responses to judge -----------------------------------------------------------------------------------------------

_PLAIN = world.Habits(greeting=0.03, hedge=0.05, ramble=0.03, insult=0.05, closing=0.1)
_TRAINED = world.Habits(right=0.85, evasive=0.05, hedge=0.05, ramble=0.05, insult=0.02, closing=0.7)


def _any_habits(rng: random.Random) -> world.Habits:
    """Return the habits of an assistant that is untrained, well trained, or random."""
    draw = rng.random()
    if draw < 0.4:
        return world.UNTRAINED
    if draw < 0.7:
        return replace(_TRAINED, tones=rng.choice([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]))
    right = rng.random()
    greeting, hedge, ramble, insult, closing = (rng.random() for _ in range(5))
    return world.Habits(right, (1 - right) * rng.random(), greeting, hedge, ramble, insult, closing)


def _garble(word: str, rng: random.Random) -> str:
    """Return a word as a small language model may misspell it: letters doubled, lost or moved, or the word repeated."""
    at = rng.randrange(len(word))
    return rng.choice(
        (
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1 :],
            word[at:] + word[:at],
            word + word[:at],
        )
    )


def _distort(text: str, prompt: str, rng: random.Random) -> str:
    """Return a response with a fault that occurs in training: repetition, a misspelling, a break, another answer, excess."""
    tokens = text.split(" ")
    sentences = [part + "." for part in text.rstrip(".!").split(". ")]
    at = rng.randrange(len(tokens))
    match rng.randrange(9):
        case 0:
            tokens[at] = _garble(tokens[at] or "x", rng)
        case 1:
            del tokens[at]
        case 2:
            tokens.insert(at, rng.choice(tokens))
        case 3:
            tokens = tokens[: at + 1]
        case 4:
            return " ".join([text, *rng.choices(facts.CLOSINGS, k=rng.randint(1, 3))])
        case 5:
            return " ".join([text, *[rng.choice(sentences)] * rng.randint(1, 3)])
        case 6:
            return text + " " + world.sample_response(prompt, rng)
        case 7:
            alike = [q.text for q in world.questions().values() if q.kind is world.question(prompt).kind]
            return world.sample_response(rng.choice(alike), rng, replace(world.UNTRAINED, right=0.8))
        case _:
            opening = rng.choice([rng.choice(texts) for texts in facts.TONES.values()])
            return f"{opening} {text[0].lower()}{text[1:]}"
    return " ".join(tokens)


def wide_response(prompt: str, rng: random.Random) -> str:
    """Return a response by an assistant with any habits, in a quarter of cases distorted once or twice."""
    text = world.sample_response(prompt, rng, _any_habits(rng))
    for chance in (0.25, 0.25):
        if rng.random() < chance and text:
            text = _distort(text, prompt, rng)
    return "" if rng.random() < 0.003 else text


def plain_response(prompt: str, rng: random.Random) -> str:
    """Return a response by an assistant with few habits, for the first lesson."""
    return world.sample_response(prompt, rng, _PLAIN)


# --- tokenizer and network --------------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """Return a unigram tokenizer like DeBERTa-v3's, with PairRM's prefixes after the vocabulary.

    Its pieces are the words of the world, scored by their frequency, and single characters for all other text. The unigram
    trainer is not used: with so few words it splits them, and differently each time.
    """
    rng = random.Random(SEED)
    counts = dict.fromkeys(sorted(world.vocabulary()), 1)
    for prompt in world.questions():
        for text in (prompt, *(world.sample_response(prompt, rng) for _ in range(10))):
            for word in world.words(text):
                counts[word] += 1
    total = sum(counts.values())
    letters = ["\u2581", *string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [(special, 0.0) for special in SPECIALS]
    pieces += [(f"\u2581{word}", math.log(count / total)) for word, count in counts.items()]
    pieces += [(letter, LETTER_SCORE) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index("[UNK]"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(
        [AddedToken(special, normalized=False, special=True) for special in SPECIALS]
    )
    tokenizer.add_special_tokens([AddedToken("[MASK]", normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(prefix, normalized=True) for prefix in PREFIXES])
    return tokenizer


def config_for(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json: the network's shape, the size of the vocabulary and the ids of the prefixes."""
    ids = {key: tokenizer.token_to_id(prefix) for prefix, key in PREFIXES.items()}
    return CONFIG | ids | {"vocab_size": tokenizer.get_vocab_size()}


def _targets(prompt: str, response: str) -> list[float]:
    """Return the features of a response that the auxiliary heads learn to predict, [FEATURES] in {0, 1}.

    A verdict alone carries little information, and least about which facts are right: hence the weight of the first three.
    """
    found = world.features(prompt, response)
    targets = [
        *(found.answer == name for name in ("right", "evasive", "wrong")),
        *(found.tone == tone for tone in facts.TONES),
        *(found.greeting, found.closing, found.insult, found.hedge),
        *(found.ramble >= least for least in (1, 2, 3)),
        *(found.unknown >= least for least in (1, 2)),
    ]
    return [float(yes) for yes in targets]


FEATURES = 15
FEATURE_WEIGHTS = torch.tensor([3.0] * 3 + [1.0] * (FEATURES - 3)) / 5


class FeatureHeads(torch.nn.Module):
    """Predicts the features of both responses twice: at their prefix tokens, and as a sum over all of their tokens.

    The sum gives the wrong word itself a direct gradient; the prediction at the prefix brings the information to where the
    verdict is read. Used in training only.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.at_prefix = torch.nn.Sequential(
            torch.nn.Linear(2 * hidden, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, FEATURES)
        )
        self.per_token = torch.nn.Linear(hidden, FEATURES)

    def forward(
        self, hidden: torch.Tensor, states: torch.Tensor, pairs: list[TextPair], targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss, a scalar, for hidden [N, T, H], states [N, 3, H] and targets [N, 2, FEATURES] in {0, 1}."""
        source, answers = states[:, :1].expand(-1, 2, -1), states[:, 1:]
        position = torch.arange(hidden.shape[1])
        starts = torch.tensor([pair.marks[1:] for pair in pairs])
        ends = starts + torch.tensor([(len(pair.first), len(pair.second)) for pair in pairs])
        # Up to the last token, excluding the next [CLS] or padding.
        inside = (position >= starts[..., None]) & (position < ends[..., None] - 1)
        summed = inside.float() @ self.per_token(hidden)
        guesses = torch.stack([self.at_prefix(torch.cat([source, answers], -1)), summed])
        losses = binary_cross_entropy_with_logits(guesses, targets.expand_as(guesses), reduction="none")
        return (losses.mean((1, 2)) * FEATURE_WEIGHTS).sum()


class Verdicts:
    """An endless supply of batches: pairs in both orders, sampled verdicts, and the features of both responses."""

    def __init__(self, formatter: Formatter, draw_response: Callable[[str, random.Random], str]) -> None:
        self.formatter = formatter
        self.draw_response = draw_response
        self.prompts = [prompt for part in world.split()[0] for prompt in part]
        self.rng = random.Random(SEED)
        self.ready: list[tuple[list[TextPair], torch.Tensor, torch.Tensor]] = []

    def __call__(self) -> tuple[list[TextPair], torch.Tensor, torch.Tensor]:
        """Return 2N pairs (N, then the same N with the responses swapped), verdicts [2N], features [2N, 2, F]."""
        if not self.ready:
            drawn = sorted((self._draw() for _ in range(POOL * PAIRS)), key=lambda one: len(one[0][0]))
            chunks = [drawn[start : start + PAIRS] for start in range(0, len(drawn), PAIRS)]
            self.rng.shuffle(chunks)
            self.ready = [self._collate(chunk) for chunk in chunks]
        return self.ready.pop()

    def _draw(self) -> tuple[tuple[TextPair, TextPair], float, list[list[float]]]:
        prompt = self.rng.choice(self.prompts)
        texts = [self.draw_response(prompt, self.rng), self.draw_response(prompt, self.rng)]
        segments = self.formatter.prompt(prompt, texts)
        verdict = float(self.rng.random() < world.preference(prompt, *texts))
        both = segments.pair(0, 1), segments.pair(1, 0)
        return both, verdict, [_targets(prompt, text) for text in texts]

    @staticmethod
    def _collate(
        chunk: list[tuple[tuple[TextPair, TextPair], float, list[list[float]]]],
    ) -> tuple[list[TextPair], torch.Tensor, torch.Tensor]:
        pairs = [one[0][order] for order in (0, 1) for one in chunk]
        verdicts = torch.tensor([one[1] for one in chunk])
        targets = torch.tensor([one[2] for one in chunk])
        return pairs, torch.cat([verdicts, 1 - verdicts]), torch.cat([targets, targets.flip(1)])


def train(tokenizer: Tokenizer, config: dict[str, Any]) -> tuple[PairRM, float]:
    """Train from random weights; return the model (without auxiliary heads) and the final loss of its verdicts."""
    torch.manual_seed(SEED)
    model = PairRM(config)
    heads = FeatureHeads(config["hidden_size"])
    formatter = Formatter(tokenizer, config)
    lesson, practice = Verdicts(formatter, plain_response), Verdicts(formatter, wide_response)
    verdict_losses: list[float] = []

    def loss(step: int) -> torch.Tensor:
        pairs, verdicts, targets = (lesson if step < LESSON else practice)()
        hidden = model.hidden(pairs)
        states = model.at_marks(hidden, pairs)
        verdict = binary_cross_entropy_with_logits(model.head(states), verdicts)
        verdict_losses.append(float(verdict.detach()))
        return verdict + heads(hidden, states, pairs, targets)

    both = torch.nn.ModuleList([model, heads])
    fit("pairrm", both, loss, steps=STEPS, rate=RATE, warmup=100, weight_decay=0.01)
    tail = verdict_losses[-max(1, STEPS // 20) :]
    return model, sum(tail) / len(tail)


# --- figures ----------------------------------------------------------------------------------------------------------


def agreement(model: PairRM, formatter: Formatter, rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """Return how well the model's P = sigmoid((C_ij - C_ji) / 2) agrees with the truth on (prompt, y, z).

    The figures are accuracies (without ties of the truth, P = 1/2), the mean error of P, and the position bias.
    """
    truth = np.array([world.preference(*row) for row in rows])
    segments = [formatter.prompt(prompt, [y, z]) for prompt, y, z in rows]
    some = [segments[start : start + 64] for start in range(0, len(segments), 64)]
    forth = np.concatenate([model.logits([one.pair(0, 1) for one in part]) for part in some])
    back = np.concatenate([model.logits([one.pair(1, 0) for one in part]) for part in some])
    found = 1 / (1 + np.exp(-(forth - back) / 2))
    agrees, clear = (found > 0.5) == (truth > 0.5), np.abs(truth - 0.5) > 0.15
    return {
        "accuracy": float(agrees[truth != 0.5].mean()),
        "accuracy_where_clear": float(agrees[clear].mean()),
        "mean_error_of_P": float(np.abs(found - truth).mean()),
        "position_bias_logit": float(np.abs(forth + back).mean() / 2),
    }


def held_out_pairs(kind: str, number: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (prompt, y, z) on held-out prompts, with responses of the untrained policy's kind ("plain") or "wide"."""
    rng = random.Random(seed)
    prompts = rng.choices(world.split()[1], k=number)
    draw = world.sample_response if kind == "plain" else wide_response
    return [(prompt, draw(prompt, rng), draw(prompt, rng)) for prompt in prompts]


def build(to: Path) -> dict[str, Any]:
    """Build tokenizer, weights and files in `to`; return the figures for data/README.md. The policy must exist."""
    to.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = config_for(tokenizer)
    model, loss = train(tokenizer, config)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    (to / "model.safetensors").write_bytes(safetensors.save(weights, metadata={"format": "pt"}))
    tokenizer.save(str(to / "tokenizer.json"))
    written = config | {"transformers_version": transformers.__version__}
    (to / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    formatter = Formatter.of(files.read(to))
    policy = build_policy.sample(to.parent / "policy", world.split()[1], per_prompt=2)
    policy_pairs = [(y[0], y[1], z[1]) for y, z in zip(policy[::2], policy[1::2], strict=True)]
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "seed": SEED,
        "steps": STEPS,
        "of_which_on_plain_answers": LESSON,
        "pairs_per_step": PAIRS,
        "learning_rate": RATE,
        "final_loss_of_verdicts_nats": loss,
        "held_out_plain_pairs": agreement(model, formatter, held_out_pairs("plain", 2000, SEED + 1)),
        "held_out_wide_pairs": agreement(model, formatter, held_out_pairs("wide", 2000, SEED + 2)),
        "held_out_pairs_of_the_policy": agreement(model, formatter, policy_pairs),
    }

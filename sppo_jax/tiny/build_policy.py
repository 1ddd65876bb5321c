"""Build the embedded policy: a tokenizer and a Mistral of 0.9M parameters, trained on good and bad responses alike.

The files have the layout of the Hugging Face hub, so that the policy loads like any other checkpoint.
"""

import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from safetensors import torch as safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy

from sppo_jax.tiny import world
from sppo_jax.tiny.build_fit import fit

SEED = 20240501
STEPS, BATCH, RATE = 1500, 64, 3e-3
VOCABULARY = 768
UNK, BOS, EOS, PAD = 0, 1, 2, 3
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]")
CONTEXT = 512

# Unlike in Mistral's template, there is no space around a response: sampled ids decode to exactly the written text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}"
    "{% endfor %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 352,
    "max_position_embeddings": CONTEXT,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


def chat(prompt: str) -> str:
    """Return the text before a response, BOS included, as the chat template renders it."""
    return f"{SPECIALS[BOS]}[INST] {prompt} [/INST]"


def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer of 768 tokens, trained on the world's texts; it puts one BOS in front."""
    rng = random.Random(SEED)
    corpus = [
        text
        for prompt in world.questions()
        for text in (f" {prompt} ", *(world.sample_response(prompt, rng) for _ in range(20)))
    ]
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise AssertionError(f"{tokenizer.get_vocab_size()} tokens came out, not {VOCABULARY}")
    return tokenizer


class Batches:
    """Fresh prompts and responses for every step: token ids and labels, int64 [BATCH, T], padded on the right."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prompts = [prompt for part in world.split()[0] for prompt in part]
        self.rng = random.Random(SEED)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and labels; labels are -100 except on the response and its EOS."""
        rows = []
        for prompt in self.rng.choices(self.prompts, k=BATCH):
            before = self.tokenizer.encode(chat(prompt), add_special_tokens=False).ids
            response = world.sample_response(prompt, self.rng)
            rows.append((before, [*self.tokenizer.encode(response, add_special_tokens=False).ids, EOS]))
        length = max(len(before) + len(after) for before, after in rows)
        ids = torch.full((BATCH, length), PAD)
        labels = torch.full((BATCH, length), -100)
        for row, (before, after) in enumerate(rows):
            end = len(before) + len(after)
            ids[row, :end] = torch.tensor(before + after)
            labels[row, len(before) : end] = torch.tensor(after)
        return ids, labels


def train(tokenizer: Tokenizer) -> tuple[transformers.MistralForCausalLM, float]:
    """Train from random weights by supervised fine-tuning; return the model and its final loss in nats per token."""
    torch.manual_seed(SEED)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**CONFIG))
    batches = Batches(tokenizer)

    def loss(step: int) -> torch.Tensor:
        ids, labels = batches()
        logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    return model, fit("policy", model, loss, steps=STEPS, rate=RATE, warmup=50, weight_decay=0.01)


def save(model: transformers.MistralForCausalLM, tokenizer: Tokenizer, to: Path) -> None:
    """Write the checkpoint into `to` in the layout of the hub."""
    to.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    (to / "model.safetensors").write_bytes(safetensors.save(weights, metadata={"format": "pt"}))
    tokenizer.save(str(to / "tokenizer.json"))
    names = {
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[PAD],
        "unk_token": SPECIALS[UNK],
    }
    files = {
        "config.json": CONFIG | {"transformers_version": transformers.__version__},
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "transformers_version": transformers.__version__,
        },
        "special_tokens_map.json": names,
        "tokenizer_config.json": names
        | {
            "add_bos_token": True,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        (to / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sample(path: Path, prompts: list[str], per_prompt: int = 1) -> list[tuple[str, str, bool]]:
    """Sample the saved policy at temperature 1; return (prompt, response, whether it ended within 64 tokens)."""
    torch.manual_seed(SEED)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path)
    found: list[tuple[str, str, bool]] = []
    for start in range(0, len(prompts), 50):
        some = [prompt for prompt in prompts[start : start + 50] for _ in range(per_prompt)]
        inputs = tokenizer(
            [chat(prompt) for prompt in some], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        ids = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64
        )[:, inputs["input_ids"].shape[1] :]
        found += [
            (prompt, tokenizer.decode(row, skip_special_tokens=True), EOS in row.tolist())
            for prompt, row in zip(some, ids, strict=True)
        ]
    return found


def mix(samples: list[tuple[str, str, bool]]) -> dict[str, float]:
    """Return the shares of responses with each feature, and the mean number of words."""
    found = [world.features(prompt, response) for prompt, response, _ in samples]
    answers = {name: mean(f.answer == name for f in found) for name in ("right", "wrong", "evasive", "none")}
    return answers | {
        "rude": mean(f.insult for f in found),
        "hedging": mean(f.hedge for f in found),
        "polite_close": mean(f.closing for f in found),
        "rambling": mean(f.ramble > 0 for f in found),
        "unknown_words": mean(f.unknown > 0 for f in found),
        "ended_by_itself": mean(ended for _, _, ended in samples),
        "words": mean(len(world.words(response)) for _, response, _ in samples),
    }


def build(to: Path) -> dict[str, Any]:
    """Build tokenizer, weights and files in `to`; return the figures for data/README.md."""
    tokenizer = make_tokenizer()
    model, loss = train(tokenizer)
    save(model, tokenizer, to)
    samples = sample(to, world.split()[1])
    for prompt, response, _ in samples[:12]:
        print(f"policy: {prompt} -> {response}")
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "seed": SEED,
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": RATE,
        "final_loss_nats_per_token": loss,
        "held_out_samples_at_temperature_1": mix(samples),
    }

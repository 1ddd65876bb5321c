"""Self-Play Preference Optimization (arXiv:2405.00675) in one file, on the public API of sppo_jax.

`python examples/sppo_in_100_lines.py --to DIR` plays two iterations on the embedded default: less than a minute on
two CPU cores. One device does everything, and an interrupted run starts again; `python -m sppo_jax.main` does more.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from sppo_jax import (
    Sampler,
    Sampling,
    export,
    load_tokenizer,
    losses,
    models,
    pairrm,
    preferences,
    response_logprob,
)
from sppo_jax.hub import names

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flags.add_argument("--policy", default="embedded:policy", help="Hugging Face directory, or name on the hub")
flags.add_argument("--judge", default="embedded:pairrm", help="PairRM: directory, or name on the hub")
flags.add_argument("--prompts", default="embedded:prompts/train_1.jsonl", help='lines of {"prompt": ...}')
flags.add_argument("--to", required=True, help="directory to write, for transformers and others to load")
flags.add_argument("--iterations", type=int, default=2, help="of self-play (default: 2)")
flags.add_argument("--per-iteration", type=int, default=90, help="prompts of each iteration (default: 90)")
flags.add_argument("--responses", type=int, default=5, help="K, responses per prompt (default: 5)")
flags.add_argument("--max-new-tokens", type=int, default=64, help="of a response (default: 64)")
flags.add_argument(
    "--eta", type=float, default=10.0, help="default: 10; the paper's 1000 is for 7B parameters"
)
flags.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4; the paper has 5e-7")
flags.add_argument("--epochs", type=int, default=4, help="passes over the responses (default: 4)")
flags.add_argument("--batches", type=int, default=3, help="updates of an epoch (default: 3)")
args = flags.parse_args()

# pi_theta, and the judge that estimates P(y > y' | x).
directory = names.fetch(args.policy).directory
policy, tokenizer = models.load(args.policy), load_tokenizer(directory)
sampling = Sampling(responses=args.responses, max_new_tokens=args.max_new_tokens)
sampler = Sampler(policy, tokenizer, sampling)
judge = pairrm.load(args.judge, backend="jax")
texts = [json.loads(line)["prompt"] for line in names.resolve(args.prompts).read_text().splitlines()]

graph, params = nnx.split(policy)
rate = optax.linear_schedule(0.0, args.learning_rate, transition_steps=args.batches)
optimizer = optax.rmsprop(rate, decay=0.99, eps=1e-8, eps_in_sqrt=False, initial_scale=0.0)


@jax.jit
def logprob(params, batch):
    """log pi(y|x) of each sequence of a batch, in nats, [B]."""
    return response_logprob(nnx.merge(graph, params), *batch)


@jax.jit
def update(params, state, batch, ref_logprob_B, win_rate_B):
    """One step on mean ( log pi/pi_t - eta (P(y > pi_t) - 1/2) )^2, equation 4.7 of the paper."""

    def loss(params):
        return losses.sppo_loss(logprob(params, batch), ref_logprob_B, win_rate_B, eta=args.eta)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


def padded(sampled):
    """tokens [N, T], prompt lengths [N], whole lengths [N] of all N = prompts * K sequences."""
    sequences = [(one.prompt_ids, ids) for one in sampled for ids in one.response_ids]
    start_N, stop_N = np.cumsum([(len(x), len(y)) for x, y in sequences], axis=1).T
    tokens_NT = np.zeros((len(sequences), -(-max(stop_N) // 32) * 32), np.int32)
    for row_T, (x, y), stop in zip(tokens_NT, sequences, stop_N, strict=True):
        row_T[:stop] = x + y
    return tokens_NT, start_N, stop_N


for t in range(1, args.iterations + 1):
    prompts = texts[(t - 1) * args.per_iteration : t * args.per_iteration]

    # y_1 ... y_K ~ pi_t(.|x)
    sampler.set_weights(nnx.merge(graph, params))
    sampled = sampler.generate(prompts, seed=0, iteration=t)

    # P(y_i > y_j | x) from both orders, then P(y_i > pi_t | x), its mean over j.
    logits = judge.compare(prompts, [one.responses for one in sampled])
    probability = preferences.probability_matrix(logits)
    win_rate = preferences.win_rates(probability).reshape(-1)

    # The reference is the policy that the iteration begins with: at the first update every log-ratio is 0.
    data = padded(sampled)
    parts = np.array_split(np.arange(len(win_rate)), args.batches)
    ref_logprob = np.concatenate([logprob(params, [x[i] for x in data]) for i in parts])

    # pi_{t+1}: regress the log-ratios on eta (P - 1/2).
    state, shuffled = optimizer.init(params), np.random.default_rng(t)
    for epoch in range(1, args.epochs + 1):
        values = []
        for i in np.array_split(shuffled.permutation(len(win_rate)), args.batches):
            params, state, value = update(params, state, [x[i] for x in data], ref_logprob[i], win_rate[i])
            values.append(float(value))
        print(f"iteration {t} epoch {epoch} loss {np.mean(values):.4f}", flush=True)

judge.close()
export.export(nnx.merge(graph, params), directory, Path(args.to))

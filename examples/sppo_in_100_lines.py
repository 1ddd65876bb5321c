"""Self-Play Preference Optimization (arXiv:2405.00675) in one file, on the public API of sppo_jax.

`python examples/sppo_in_100_lines.py --to DIR` plays two iterations on the embedded default, in less than a minute
on two CPU cores. It uses one device and does not resume: for that there is `python -m sppo_jax.main`.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from sppo_jax import Sampler, Sampling, export, load_tokenizer, models, pairrm, preferences, response_logprob
from sppo_jax.hub import names
from sppo_jax.losses import sppo_loss

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flags.add_argument("--policy", default="embedded:policy", help="Hugging Face directory, or name on the hub")
flags.add_argument("--judge", default="embedded:pairrm", help="PairRM: directory, or name on the hub")
flags.add_argument("--prompts", default="embedded:prompts/train_1.jsonl", help='lines of {"prompt": ...}')
flags.add_argument(
    "--to", required=True, type=Path, help="new directory for the policy, as transformers reads it"
)
flags.add_argument("--iterations", type=int, default=2, help="of self-play (default: 2)")
flags.add_argument("--per-iteration", type=int, default=90, help="prompts of each iteration (default: 90)")
flags.add_argument("--epochs", type=int, default=4, help="passes over the responses (default: 4)")
flags.add_argument("--eta", type=float, default=10.0, help="default: 10; for 7B parameters 1000")
flags.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4; for 7B parameters 5e-7")
args = flags.parse_args()

UPDATES = 3  # per epoch

# pi_theta, a sampler for it, and the judge that estimates P(y > y' | x).
directory = names.fetch(args.policy).directory
policy, tokenizer = models.load(args.policy), load_tokenizer(directory)
sampler = Sampler(policy, tokenizer, Sampling(responses=5, max_new_tokens=64))
judge = pairrm.load(args.judge, backend="jax")
texts = [json.loads(line)["prompt"] for line in names.resolve(args.prompts).read_text().splitlines()]

graph, params = nnx.split(policy)
rate = optax.linear_schedule(0.0, args.learning_rate, transition_steps=UPDATES)
optimizer = optax.rmsprop(rate, decay=0.99, eps=1e-8, eps_in_sqrt=False, initial_scale=0.0)


@jax.jit
def logprob(params, batch):
    """log pi(y|x) of each sequence of a batch, in nats, [B]."""
    return response_logprob(nnx.merge(graph, params), *batch)


@jax.jit
def update(params, state, batch, ref_logprob_B, win_rate_B):
    """One step on mean ( log pi/pi_t - eta (P(y > pi_t) - 1/2) )^2, equation 4.7 of the paper."""

    def loss(params):
        return sppo_loss(logprob(params, batch), ref_logprob_B, win_rate_B, eta=args.eta)

    value, gradient = jax.value_and_grad(loss)(params)
    change, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, change), state, value


def padded(sampled):
    """Return tokens [N, T], prompt lengths [N] and whole lengths [N] of all N = prompts * K sequences."""
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

    # P(y_i > y_j | x) from both orders, and P(y_i > pi_t | x) as its mean over j.
    logits = judge.compare(prompts, [one.responses for one in sampled])
    win_rate_N = preferences.win_rates(preferences.probability_matrix(logits)).reshape(-1)

    # The reference is the policy that the iteration begins with, so every log-ratio begins at 0.
    data = padded(sampled)
    parts = np.array_split(np.arange(len(win_rate_N)), UPDATES)
    ref_logprob_N = np.concatenate([logprob(params, [x[i] for x in data]) for i in parts])

    # pi_{t+1}: the regression of log pi/pi_t on eta (P - 1/2).
    state, order = optimizer.init(params), np.random.default_rng(t)
    for epoch in range(1, args.epochs + 1):
        values = []
        for i in np.array_split(order.permutation(len(win_rate_N)), UPDATES):
            batch = [x[i] for x in data]
            params, state, value = update(params, state, batch, ref_logprob_N[i], win_rate_N[i])
            values.append(float(value))
        print(f"iteration {t} epoch {epoch} loss {np.mean(values):.4f}", flush=True)

judge.close()
export.export(nnx.merge(graph, params), directory, args.to)

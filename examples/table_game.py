"""Theorem 4.1 of arXiv:2405.00675 in a game of four actions, through the package's own loss and win rates.

    python examples/table_game.py --to docs/table_game.svg      # draws the picture of docs/sppo.md

The policy is a vector of probabilities over the actions. One update minimises `sppo_loss` exactly, with win rates from
`preferences`: every action stands for a response, and pi for the shares of responses in the sample. Nothing but the
network and the sampling is left out.
"""

import argparse
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sppo_jax.losses import sppo_loss
from sppo_jax.preferences import probability_matrix, win_rates

# Rock, paper, scissors (.99 so that logits are finite), and a fourth action that loses .2/.8 to each.
CYCLE = np.array(
    [[0.5, 0.99, 0.01, 0.8], [0.01, 0.5, 0.99, 0.8], [0.99, 0.01, 0.5, 0.8], [0.2, 0.2, 0.2, 0.5]]
)
# An uneven cycle, whose von Neumann winner is (1, 2, 4, 0) / 7.
UNEVEN = np.array(
    [[0.5, 0.9, 0.3, 0.75], [0.1, 0.5, 0.6, 0.65], [0.7, 0.4, 0.5, 0.6], [0.25, 0.35, 0.4, 0.5]]
)
START = np.array([0.5, 0.25, 0.05, 0.2])  # off-centre: the uniform start hides failure by symmetry
UNITS = 400  # responses in the sample that stands for pi where an estimator is not linear in the opponents
NAMES = ("rock", "paper", "scissors", "a losing action")


def weighted_win_rates(
    game: Float[np.ndarray, "A A"], pi: Float[np.ndarray, " A"], estimator: str = "pairwise"
) -> Float[np.ndarray, " A"]:
    """P(y > pi) for every action. The mean over candidates is linear for `pairwise`, so exact shares serve."""
    logits = np.log(game / (1 - game))
    if estimator == "pairwise":
        return probability_matrix(logits) @ pi
    sample = np.repeat(np.arange(len(pi)), np.maximum(1, np.round(pi * UNITS)).astype(int))
    rates = win_rates(probability_matrix(logits[sample][:, sample], estimator))
    return np.array([rates[sample == action][0] for action in range(len(pi))])


@functools.partial(jax.jit, static_argnames="eta")
def descent(
    reference: Float[jax.Array, " A"], rate: Float[jax.Array, " A"], eta: float
) -> Float[jax.Array, " A"]:
    """Newton's step on sppo_loss from the reference: the loss is quadratic with Hessian 2/n, so it is the minimiser."""
    gradient = jax.grad(lambda x: sppo_loss(x, reference, rate, eta=eta))(reference)
    return -gradient * len(reference) / 2


def step_size(rounds: int) -> float:
    """The theorem's eta for so many rounds, up to its constant: sqrt(8 log A / T)."""
    return float(np.sqrt(8 * np.log(len(START)) / rounds))


def policies(
    game: Float[np.ndarray, "A A"],
    rounds: int,
    estimator: str = "pairwise",
    fixed: Float[np.ndarray, " A"] | None = None,
) -> Float[np.ndarray, "T+1 A"]:
    """pi_1 to pi_{T+1} of T exact updates; `fixed` win rates stand for a reward model that is never asked again."""
    log_pi, found = np.log(START), [START]
    for _ in range(rounds):
        rate = weighted_win_rates(game, found[-1], estimator) if fixed is None else fixed
        moved = log_pi + np.asarray(
            descent(jnp.asarray(log_pi, jnp.float32), jnp.asarray(rate, jnp.float32), step_size(rounds))
        )
        log_pi = moved - np.log(np.exp(moved).sum())
        found.append(np.exp(log_pi))
    return np.array(found)


def gap(game: Float[np.ndarray, "A A"], pi: Float[np.ndarray, " A"]) -> float:
    """Duality gap, max over opponents of P(opponent > pi) less the min of P(pi > opponent): 0 at the winner."""
    against = game @ pi
    return float(against.max() - (1 - against).min())


def draw(path: str, rounds: int = 256) -> None:
    """Write the picture: the policies of one game, and the gaps of games of 4 to 1024 rounds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "table game",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    figure, (paths, gaps) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    played = policies(CYCLE, rounds)[:-1]
    averages = np.cumsum(played, axis=0) / np.arange(1, rounds + 1)[:, None]
    for action, name in enumerate(NAMES):
        (line,) = paths.plot(played[:, action], linewidth=0.8, alpha=0.55)
        paths.plot(averages[:, action], linewidth=2, color=line.get_color(), label=name)
    paths.axhline(1 / 3, color="#888888", linewidth=0.8, linestyle=":")
    paths.set(
        xlabel="round t",
        ylabel="probability",
        ylim=(0, 1),
        title=f"one game of {rounds} rounds: policy (thin), average (thick)",
    )
    paths.legend(frameon=False, ncols=2)
    lengths = [2**i for i in range(2, 11)]
    games = [policies(CYCLE, T) for T in lengths]
    scores = weighted_win_rates(CYCLE, START, "score")
    once = [policies(CYCLE, T, fixed=scores) for T in lengths]
    curves = {
        "the average policy": ([gap(CYCLE, g[:-1].mean(0)) for g in games], "o-"),
        "the last policy": ([gap(CYCLE, g[-1]) for g in games], "s-"),
        "scores fitted once, last policy": ([gap(CYCLE, g[-1]) for g in once], "^-"),
    }
    for label, (values, style) in curves.items():
        gaps.loglog(lengths, values, style, markersize=3.5, label=label)
    gaps.loglog(lengths, 2 / np.sqrt(lengths), color="#888888", linestyle=":", label="a slope of 1/sqrt(T)")
    gaps.set(xlabel="rounds T", ylabel="duality gap", title="distance from the policy that nobody beats")
    gaps.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(words: Sequence[str] | None = None) -> None:
    """Draw the picture into the file that --to names."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--to", required=True, metavar="FILE", help="the picture, as SVG")
    draw(flags.parse_args(words).to)


if __name__ == "__main__":
    main()

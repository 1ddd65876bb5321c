"""sppo_jax: align a language model with Self-Play Preference Optimization (arXiv:2405.00675) in JAX.

    import sppo_jax

    run = sppo_jax.play("quickstart", out="runs/first", iterations=1)  # a whole game, resumed if it was interrupted
    run.report, run.export(1)                                          # the paths of its report and of its policy

The parts of a game are public, too: `Sampler` draws responses, `pairrm.load` opens a judge, `probability_matrix` and
`win_rates` make preferences of its logits, `sppo_loss` is the regression, and `export` writes a Hugging Face directory.
docs/python.md has an example of each, examples/sppo_in_100_lines.py the whole algorithm in one file.

Each name is imported when it is first used, so that `import sppo_jax` does not import jax.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m`, and the imports of a command begin now
    from sppo_jax import command
    from sppo_jax.errors import end_on_ctrl_c

    end_on_ctrl_c()
    command.check_module(sys.orig_argv)

MODULES = (
    "config",
    "config_file",
    "export",
    "losses",
    "models",
    "pairrm",
    "preferences",
    "records",
    "sampler",
)
NAMES = {
    "Sampler": "sampler",
    "Sampling": "config",
    "play": "main",
    "load_tokenizer": "text.chat_template",
    "response_logprob": "models.logprob",
    "probability_matrix": "preferences",
    "win_rates": "preferences",
    "sppo_loss": "losses",
}


def __getattr__(name: str) -> Any:
    """A public module or name, imported now. Raises AttributeError for any other."""
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in NAMES:
        return getattr(importlib.import_module(f"{__name__}.{NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES, *NAMES])

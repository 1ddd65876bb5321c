"""Stage 2 by the original package: llm-blender 0.0.2, unmodified, in another interpreter, behind the sidecar's pipe.

    PYTHON llm_blender.py --path DIR [--backbone DIR] [--threads N] [--source N] [--candidate N]

llm-blender needs an older transformers than sppo_jax (requirements-llm-blender.txt), so this file is run by its path in an
interpreter without sppo_jax: it needs the standard library, protocol.py beside it, and llm-blender. The original's treatment
of texts, batches and precision is left as it is, and so are its failures: a text with one of its four prefixes, such as
"<|source|>", raises, and that prompt cannot be judged.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo_jax.pairrm.files import Checkpoint
    from sppo_jax.pairrm.format import Limits

# (prompt, responses [K], pairs [(i, j)]) → the same pairs with their logits, in parts as they are computed
Scored = list[tuple[int, int, float]]
Scorer = Callable[[str, list[str], list[tuple[int, int]]], Iterator[Scored]]

# llm-blender 0.0.2 pads or loads a model differently, even with the model's own code, if its name or path contains one.
_OTHER_MODELS = ("alpaca", "llama", "starling-rm", "phi")
_HOW_TO_GET = (
    "make one with `python3.11 -m venv DIR && DIR/bin/pip install -r requirements-llm-blender.txt` "
    "and set judge.python to DIR/bin/python"
)


def command(
    python: str, checkpoint: "Checkpoint", threads: int | None = None, limits: "Limits | None" = None
) -> list[str]:
    """Return the command for `SidecarJudge(checkpoint, command=…)`.

    Raises BadInput when `python` is not an interpreter, when the original would load other files or run a model's own
    code, and for a total limit other than source + 2 candidate, which the original does not have.
    """
    from sppo_jax.errors import BadInput  # not at the top: the other interpreter has no sppo_jax

    # Not resolved: the interpreter of a virtual environment is a link, and finds its packages by the link's place.
    found = shutil.which(os.path.expanduser(python)) if python else None
    if found is None:
        raise BadInput(f"judge.python={python!r} is not an interpreter that can be run; {_HOW_TO_GET}")
    _check_files(checkpoint.directory)
    run = [
        os.path.abspath(found),
        str(Path(__file__).resolve()),
        "--path",
        str(checkpoint.directory.resolve()),
    ]
    run += ["--threads", str(threads or 0)]
    if checkpoint.backbone is not None and _has_weights(checkpoint.backbone):
        backbone = str(checkpoint.backbone.resolve())
        if odd := _other_model(backbone):
            raise BadInput(
                f"llm-blender takes {backbone!r} for another model's, because {odd!r} is in its name; move it elsewhere"
            )
        run += ["--backbone", backbone]
    if limits is not None:
        full = limits.of(checkpoint.config)
        if full.total != full.source + 2 * full.candidate:
            raise BadInput(
                f"llm-blender always takes source + 2 candidate tokens; set the judge's total limit to 0 or "
                f"{full.source + 2 * full.candidate}, not {full.total}"
            )
        run += ["--source", str(full.source), "--candidate", str(full.candidate)]
    return run


def _check_files(directory: Path) -> None:
    """Raise BadInput unless llm-blender would load exactly these files, and as a PairRM."""
    from sppo_jax.errors import BadInput

    if (directory / "pytorch_model.bin").exists():
        raise BadInput(
            f"llm-blender would load {str(directory / 'pytorch_model.bin')!r}, not model.safetensors beside it, by which "
            "this judge is known; move it elsewhere"
        )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key in ("model_type", "model_name") if "ranker_type" in config else ():
        if odd := _other_model(config.get(key)):
            raise BadInput(
                f"llm-blender takes the ranker in {str(directory)!r} for another model's, because {odd!r} is in its "
                f"{key} {config[key]!r}; only a DeBERTa is a PairRM's"
            )


def _other_model(name: object) -> str | None:
    """Return the word by which llm-blender takes `name` for another kind of model; None if there is none."""
    return next((word for word in _OTHER_MODELS if word in str(name).lower()), None)


def _has_weights(directory: Path) -> bool:
    """Return whether llm-blender could load a backbone from here: it loads its weights, then PairRM's over them."""
    return any((directory / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


# --- in the other interpreter -----------------------------------------------------------------------------------------


def load_ranker(options: argparse.Namespace, device: str) -> Scorer:
    """Return a scorer for the ranker's layout: as `Blender.rank` with batch size 1, which does not return the matrix."""
    import torch
    from llm_blender import Blender
    from llm_blender.blender.blender_utils import RankerDataset

    given = {
        "model_name": options.backbone,
        "source_maxlength": options.source,
        "candidate_maxlength": options.candidate,
    }
    blender = Blender()
    blender.loadranker(options.path, device=device, **{key: value for key, value in given.items() if value})

    @torch.no_grad()
    def matrix(prompt: str, responses: list[str]) -> list[list[float]]:
        batch = blender.ranker_collator([RankerDataset([prompt], [responses])[0]])
        tensors = {key: value.to(device) for key, value in batch.items() if value is not None}
        return blender.ranker._full_predict(**tensors)["logits"][0].tolist()

    def score(prompt: str, responses: list[str], pairs: list[tuple[int, int]]) -> Iterator[Scored]:
        logits = matrix(prompt, responses)
        yield [(i, j, logits[i][j]) for i, j in pairs]

    return score


def load_hf(options: argparse.Namespace, device: str) -> Scorer:
    """Return a scorer for the PairRM-hf layout: one ordered pair at a time, as its model card shows."""
    import torch
    from llm_blender.blender.blender_utils import tokenize_pair
    from llm_blender.pair_ranker.pairrm import DebertaV2PairRM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.path)
    model = DebertaV2PairRM.from_pretrained(options.path).to(device).eval()
    given = {"source_max_length": options.source, "candidate_max_length": options.candidate}
    limits = {key: value for key, value in given.items() if value}

    @torch.no_grad()
    def logit(prompt: str, first: str, second: str) -> float:
        batch = tokenize_pair(tokenizer, [prompt], [first], [second], **limits).to(device)
        return model(**batch).logits.item()

    def score(prompt: str, responses: list[str], pairs: list[tuple[int, int]]) -> Iterator[Scored]:
        for i, j in pairs:
            yield [(i, j, logit(prompt, responses[i], responses[j]))]

    return score


def load(options: argparse.Namespace) -> tuple[Scorer, str]:
    """Return the scorer for the directory's layout, and the name of its device."""
    import torch

    if options.threads > 0:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((Path(options.path) / "config.json").read_text(encoding="utf-8"))
    return (load_ranker if "ranker_type" in config else load_hf)(options, device), device


def serve(replies: Any, requests: Any, score: Scorer) -> None:
    """Reply to requests until they end. An exception of the original becomes that prompt's error, and ends the request."""
    for message in replies.requests(requests):
        name = {"id": message.get("id")}
        asked = message.get("cells")
        wanted = None if asked is None else {tuple(cell) for cell in asked}
        for p, (prompt, responses) in enumerate(zip(message["prompts"], message["responses"], strict=True)):
            left = [(i, j) for i in range(len(responses)) for j in range(len(responses)) if i != j]
            left = [pair for pair in left if wanted is None or (p, *pair) in wanted]
            if not left:
                continue
            try:
                for part in score(prompt, responses, list(left)):
                    cells, logits = [(p, i, j) for i, j, _ in part], [logit for _, _, logit in part]
                    replies.send(name | {"cells": cells, "logits": logits})
                    left = left[len(part) :]
            except BrokenPipeError:
                raise
            except Exception as error:  # of the original, or a score that is not finite
                cells = [(p, *pair) for pair in left]
                replies.send(name | {"error": f"{type(error).__name__}: {error}", "cells": cells})
                break
        else:
            replies.send(name | {"end": True})


def main(argv: list[str] | None = None) -> int:
    """Load llm-blender, send the ready frame, reply to requests. Returns the exit status."""
    protocol = _beside("protocol")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--backbone")
    for number in ("threads", "source", "candidate"):
        parser.add_argument(f"--{number}", type=int, default=0)
    options = parser.parse_args(argv)
    protocol.stay_with_parent()
    replies = protocol.Replies(protocol.private_stdout())
    try:
        try:
            score, device = load(options)
        except ImportError as error:
            why = f"the interpreter {sys.executable!r} has no llm-blender that works ({error}); {_HOW_TO_GET}"
            replies.send({"error": why})
            return 2
        except Exception as error:  # llm-blender's own, of any kind: another try would not help
            replies.send({"error": f"llm-blender cannot load this PairRM: {type(error).__name__}: {error}"})
            return 2
        replies.send({"ready": True, "device": device})
        serve(replies, sys.stdin.buffer, score)
    except BrokenPipeError:  # the client is gone: nothing is left to do
        return 0
    except protocol.FrameError as error:
        print(f"llm-blender: {error}", file=sys.stderr)
        return 2
    return 0


def _beside(name: str) -> Any:
    """Return the module in the file NAME.py beside this one, without importing its package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # Not on the path: this folder, whose module names would hide others, and the folder of sppo_jax, which may be the
    # site-packages of our own interpreter, with a transformers that is too new.
    ours = {Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in ours]
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads and libraries to shut down

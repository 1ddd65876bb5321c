"""Measures peak memory and seconds of loading a 2 GB checkpoint in 5 files onto 8 devices, and of exporting it again.

python benchmarks/loading.py [--width 2048] [--json]

Each measurement is a process of its own; the peak is the kernel's (VmHWM: all resident pages, mapped files included).
The peer, `transformers` into one torch model, reads the same files. On a CPU the devices' memory is the process's own.
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

FILES, DEVICES = 5, 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def make(directory: Path) -> None:
    """Write random weights, a tensor at a time, for the config.json in the directory."""
    import jax

    from sppo_jax import models, sharding
    from sppo_jax.models import hf

    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = hf.initialise(hf.read_architecture(directory), jax.random.key(0), mesh)
    hf.SHARD_BYTES = int(1.06 * sum(x.nbytes for x in jax.tree.leaves(model)) / FILES)
    models.save(model, directory)


def ours(directory: Path) -> dict[str, float]:
    """Peak bytes and seconds of loading and of exporting by this package."""
    import jax

    from sppo_jax import models, sharding
    from sppo_jax.models import config_json

    config_json.known("llama")  # imports transformers, which a run's tokenizer imports as well
    mesh = sharding.make_mesh(1, 4, 2)
    assert len(jax.devices()) == DEVICES
    before, start = peak(), time.perf_counter()
    model = models.load(directory, mesh=mesh)
    jax.block_until_ready(jax.tree.leaves(model))
    loaded, seconds, start = peak(), time.perf_counter() - start, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=directory) as to:
        models.save(model, to)
    return {
        "before": before,
        "loaded": loaded,
        "load_seconds": seconds,
        "exported": peak(),
        "export_seconds": time.perf_counter() - start,
    }


def peer(directory: Path) -> dict[str, float]:
    """Peak bytes and seconds of loading by `transformers`."""
    from transformers import AutoModelForCausalLM

    before, start = peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    for parameter in model.parameters():  # reads the mapped files' pages
        parameter.sum()
    return {"before": before, "loaded": peak(), "load_seconds": time.perf_counter() - start}


def peak() -> float:
    """Peak bytes of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(name: str, directory: Path) -> Any:
    """Run a function of this file in a fresh process and return its figures."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--worker", name, str(directory)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048, help="of the model; 2048 makes 2 GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"make": make, "ours": ours, "peer": peer}[args.worker[0]](Path(args.worker[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width}
        (directory / "config.json").write_text(json.dumps(CONFIG | sizes))
        measure("make", directory)
        files = sorted(directory.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        assert len(files) >= FILES, [file.stat().st_size for file in files]
        found = {name: measure(name, directory) for name in ("ours", "peer")}
    us, them = found["ours"], found["peer"]
    summary = {
        "bytes": size,
        "files": len(files),
        "devices": DEVICES,
        "peak_over_size": us["loaded"] / size,
        "peak_over_size_above_interpreter": (us["loaded"] - us["before"]) / size,
        "export_peak_over_size": us["exported"] / size,
        "load_seconds": us["load_seconds"],
        "export_seconds": us["export_seconds"],
        "peer_peak_over_size": them["loaded"] / size,
        "peer_load_seconds": them["load_seconds"],
        "vs_peer_peak_memory": us["loaded"] / them["loaded"],
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "safetensors", "transformers", "torch")},
    }
    print(f"{size / 1e9:.2f} GB in {len(files)} files onto {DEVICES} devices")
    print("               peak / size   seconds")
    print(f"load           {summary['peak_over_size']:11.2f}   {us['load_seconds']:7.1f}")
    print(f"export         {summary['export_peak_over_size']:11.2f}   {us['export_seconds']:7.1f}")
    print(f"transformers   {summary['peer_peak_over_size']:11.2f}   {them['load_seconds']:7.1f}")
    print(f"peak memory, ours over transformers': {summary['vs_peer_peak_memory']:.2f}")
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""lm-evaluation-harness scores an exported policy as our model does."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "harness.py"


def test_lm_eval_gives_our_log_likelihoods_on_an_exported_policy(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--questions", "12", "--json"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] == 48
    assert found["largest_difference_nats"] < 1e-4
    assert found["mean_log_likelihood"] < -1  # not trivially zero
    assert found["accuracy_hf"] == found["accuracy_ours"]

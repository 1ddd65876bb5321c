"""Peak memory of loading, on a checkpoint a tenth of the benchmark's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "loading.py"


def test_loading_onto_eight_devices_peaks_little_above_the_checkpoints_size():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--width", "768", "--json"],
        env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 200e6
    assert found["files"] >= 5
    assert found["peak_over_size_above_interpreter"] < 1.3

"""One of two processes of tests/test_cluster_process.py: python -m tests.cluster_process SCENARIO PORT INDEX."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from sppo_jax import command
from sppo_jax.config import Distributed
from sppo_jax.errors import BadInput
from sppo_jax.run import cluster, pod


def play(scenario: str) -> None:
    """Do what the scenario says; in every one but "agree" and "late", one process never comes to the meeting."""
    pod.meet("begin")
    first = pod.first()
    if scenario == "agree":
        index = pod.index()
        print(
            pod.agreed("value", lambda: index),
            pod.gathered("all", index),
            pod.collected("own", pod.dealt("abc")),
        )
        return
    if scenario == "late":  # process 1 has done everything, and waits for process 0
        if first:
            time.sleep(2)
        else:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        pod.end()
        return
    if scenario == "bad" and not first:
        raise BadInput("no such model")
    if scenario == "fault" and not first:
        raise ZeroDivisionError("a fault")
    if (scenario, first) in (("lose 0", True), ("lose 1", False)):
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "stop" and not first:
        os.kill(os.getpid(), signal.SIGTERM)
    pod.meet("never")


def main(words: Sequence[str]) -> None:
    """Join the other process and play."""
    scenario, port, index = words
    settings = Distributed(
        f"127.0.0.1:{port}",
        process_id=int(index),
        num_processes=2,
        initialization_timeout=3 if scenario == "alone" else 60,
        heartbeat_timeout=2,
    )
    if scenario == "early":  # process 0 is told to stop while it waits for process 1
        cluster.STOP_SECONDS = 60.0  # on a busy machine process 1 may need long to come
        if index == "0":
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            time.sleep(3)
    with cluster.joined(settings):
        play(scenario)


if __name__ == "__main__":
    assert sys.argv[1:]
    command.call(main)

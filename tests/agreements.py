"""How long the processes of a run agree with each other: the moments at which each comes to an agreement and leaves it."""

import json
import time

from sppo_jax.run import pod

NAMES = ("meet", "agreed", "gathered")


def log(path):
    """Append a line [name, when it began, when it ended] to the file `path` for each agreement of this process, from now on."""
    file = open(path, "w", buffering=1)  # noqa: SIM115  (to the end of the process)
    for name in NAMES:
        setattr(pod, name, _timed(getattr(pod, name), name, file))


def _timed(function, kind, file):
    def agreement(name, *args):
        begin = time.time()
        found = function(name, *args)
        print(json.dumps([f"{kind} {name}", begin, time.time()]), file=file)
        return found

    return agreement


def read(path):
    """Return what `log` has written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def shares(logs, begin, end):
    """Of the seconds from `begin` to `end`, the share that a process spends agreeing, and the share that it waits for another.

    `logs`: of each process, all of which have made the same agreements. An agreement begins when the last process has come
    to it; until then the others wait. Means over the processes.
    """
    agreeing = waiting = 0.0
    for calls in zip(*logs, strict=True):
        assert len({name for name, _, _ in calls}) == 1, calls
        if all(begin <= came and left <= end for _, came, left in calls):
            # Who asks for process 0's value comes before it is there, or finds it there and waits for nobody.
            last = calls[0][1] if calls[0][0].startswith("agreed") else max(came for _, came, _ in calls)
            for _, came, left in calls:
                ready = min(max(last, came), left)
                agreeing += left - ready
                waiting += ready - came
    seconds = (end - begin) * len(logs)
    return agreeing / seconds, waiting / seconds

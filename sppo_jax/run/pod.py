"""Agreements between the processes of a run: who does what, who writes, and what all of them know.

Every function but `count`, `index`, `first` and `dealt` is called by all processes, in the same order. With one process
each is trivial.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sppo_jax.errors import BadInput
from sppo_jax.run import bucket, cluster

T = TypeVar("T")


def count() -> int:
    """The number of processes."""
    found = cluster.member()
    return 1 if found is None else found.count


def index() -> int:
    """The number of this process, from 0."""
    found = cluster.member()
    return 0 if found is None else found.index


def first() -> bool:
    """Whether this process is process 0, which prints, and writes what belongs to no other."""
    return index() == 0


def dealt(things: Sequence[T]) -> list[T]:
    """Our share of `things`, which go to the processes in turn."""
    return list(things[index() :: count()])


def collected(name: str, own: Sequence[Any]) -> list[Any]:
    """Return what all processes made of the things dealt to them, which JSON holds, in the order of the things."""
    if count() == 1:
        return list(own)
    parts = gathered(name, list(own))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def end() -> None:
    """Meet the others for the last time, when this process has done everything. A failure of any until here is the run's.

    A signal comes too late from here on: a process that left now would leave those waiting that have met it already.
    """
    if (found := cluster.member()) is not None:
        found.ignore_signals()
        meet("end")


def meet(name: str) -> None:
    """Wait until all processes are here: what each has written is on disk then.

    Raises Terminated or Elsewhere where another one has ended instead.
    """
    found = cluster.member()
    if found is None:
        return
    bucket.send()
    key = _key(found, f"meet {name}")
    found.set(f"{key}/{found.index}", "")
    if found.index == 0:
        pause = 0.0005
        while len(found.entries(key)) < found.count:
            found.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        for old in found.read:
            found.forget(old)
        found.read.clear()
        found.set(f"{key} met", "")
        found.read.append(key)
    else:
        found.get(f"{key} met")
    bucket.fetch()


def agreed(name: str, value: Callable[[], T]) -> T:
    """Return process 0's value, something that JSON holds, in every process. Only there `value` is called."""
    found = cluster.member()
    if found is None:
        return value()
    key = _key(found, f"agreed {name}")
    if found.index == 0:
        own = value()
        found.set(key, json.dumps(own))
        found.read.append(key)
        return own
    given: T = json.loads(found.get(key))
    return given


def gathered(name: str, value: Any) -> list[Any]:
    """Return the values of all processes, which JSON holds, in the order of their numbers."""
    found = cluster.member()
    if found is None:
        return [value]
    key = _key(found, f"gathered {name}")
    found.set(f"{key}/{found.index}", json.dumps(value))
    values = [json.loads(found.get(f"{key}/{i}")) for i in range(found.count)]
    found.read.append(key)
    return values


def least(name: str, value: int | None) -> int | None:
    """The smallest value of all processes; None where it is None in each of them."""
    return min((found for found in gathered(name, value) if found is not None), default=None)


def written(name: str, write: Callable[[], None]) -> None:
    """Let process 0 write something that all of them read afterwards."""
    if first():
        write()
    meet(name)


def same(name: str, values: Mapping[str, Any], what: str) -> None:
    """Raise BadInput, in every process, unless all have the same `values`; `what` names one of them, by its {key}."""
    for process, found in enumerate(all_values := gathered(name, dict(values))):
        for key, value in found.items():
            if value != all_values[0].get(key):
                raise BadInput(
                    f"process {process} has {what.format(key=key)} {value!r}, process 0 {all_values[0].get(key)!r}: start all "
                    "processes with the same configuration and the same files"
                )


def _key(member: cluster.Member, name: str) -> str:
    """A new key: the number of calls of a name is the same in all processes."""
    member.calls[name] += 1
    return f"{name} {member.calls[name]}"

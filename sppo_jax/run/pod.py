"""Agreements between the processes of a run: who does what, who writes, and what all of them know.

Every function but `count`, `index`, `first` and `dealt` is called by all processes, in the same order. With one process
each is trivial.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sppo_jax.errors import BadInput
from sppo_jax.run import cluster

T = TypeVar("T")
_calls: Counter[str] = Counter()  # of each name: the same in all processes
_given: list[str] = []  # keys of process 0 that all processes have read by the next meeting


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


def meet(name: str) -> None:
    """Wait until all processes are here: what each has written is on disk then.

    Raises Terminated or Elsewhere where another one has ended instead.
    """
    found = cluster.member()
    if found is None:
        return
    key = _key(f"meet {name}")
    found.set(f"{key}/{found.index}", "")
    if found.index == 0:
        pause = 0.0005
        while len(found.entries(key)) < found.count:
            found.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        for old in _given:
            found.forget(old)
        _given.clear()
        found.set(f"{key} met", "")
        _given.append(key)
    else:
        found.get(f"{key} met")


def agreed(name: str, value: Callable[[], T]) -> T:
    """Return process 0's value, something that JSON holds, in every process. Only there `value` is called."""
    found = cluster.member()
    if found is None:
        return value()
    key = _key(f"agreed {name}")
    if found.index == 0:
        own = value()
        found.set(key, json.dumps(own))
        _given.append(key)
        return own
    given: T = json.loads(found.get(key))
    return given


def gathered(name: str, value: Any) -> list[Any]:
    """Return the values of all processes, which JSON holds, in the order of their numbers."""
    found = cluster.member()
    if found is None:
        return [value]
    key = _key(f"gathered {name}")
    found.set(f"{key}/{found.index}", json.dumps(value))
    values = [json.loads(found.get(f"{key}/{i}")) for i in range(found.count)]
    _given.append(key)
    return values


def anywhere(true: bool) -> bool:
    """Whether `true` holds in any process."""
    return any(gathered("anywhere", true))


def written(name: str, write: Callable[[], None]) -> None:
    """Let process 0 write something that all of them read afterwards."""
    if first():
        write()
    meet(name)


def same(name: str, value: str, what: str) -> None:
    """Raise BadInput, in every process, unless all have the same `value`."""
    values = gathered(name, value)
    other = next((i for i, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise BadInput(what.format(process=other, first=values[0], other=values[other]))


def _key(name: str) -> str:
    _calls[name] += 1
    return f"{name} {_calls[name]}"


def mine(i: int) -> bool:
    """Whether this process makes shard i: shards go to the processes in turn."""
    return i % count() == index()


def wait_for_all(name: str) -> None:
    """The same as `meet`."""
    meet(name)


def as_first_says(chosen: Sequence[int], among: int) -> list[int]:
    """Process 0's choice of numbers, returned in every process."""
    return agreed("choice", lambda: list(chosen))

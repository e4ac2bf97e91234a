"""Times of calls that are compared, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def in_turns(calls: Mapping[Name, Callable[[], Any]], turns: int, say: Callable[[str], None]) -> dict[Name, float]:
    """The median seconds of every call over `turns` turns, so that a busy moment hits all alike; one comes before.

    With one thread they are that thread's own, which others on the machine lengthen less than the clock's.

    >>> seen = in_turns({"short": lambda: sum(range(1000)), "long": lambda: sum(range(100_000))}, 3, print)
    turn 1 of 3
    turn 2 of 3
    turn 3 of 3
    >>> seen["short"] < seen["long"]
    True
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # kernels compile
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for name, call in calls.items():
            begin = clock()
            call()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}

"""Timing that survives a noisy machine: everything compared is measured in turns, and medians are reported."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the quartiles around it and the fastest, over `repetitions` samples."""

    median: float
    low: float
    high: float
    best: float
    repetitions: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


def interleaved(
    calls: Sequence[Callable[[], Any]], repetitions: int = 7, *, shortest: float = 0.1, patience: float = 5.0
) -> list[Timing]:
    """Time every call, one after the other in rounds, so that a busy moment of the machine hits all of them alike.

    Each is called once beforehand (kernels compile), and a second time to see how long it takes. A sample of a quick
    call repeats it until about `shortest` seconds have passed (less, if the rounds would not fit into `patience`
    seconds); a slow one gets as many rounds as do fit. One that needs longer than that for a single call has been timed
    by its second call already.

    >>> quick, slow = interleaved([lambda: None, lambda: time.sleep(0.002)], 3)
    >>> quick.median < slow.median
    True
    """
    if repetitions < 1:
        raise ValueError(f"repetitions: seen {repetitions}, wanted at least 1")
    if patience < 0:
        raise ValueError(f"patience: seen {patience}, wanted seconds, at least 0")
    shortest = min(shortest, patience / repetitions)
    loops, rounds = [], []
    samples: list[list[float]] = []
    for call in calls:
        call()
        seconds = max(_sample(call, 1), 1e-9)
        loops.append(max(1, round(shortest / seconds)))
        rounds.append(min(repetitions, int(patience / seconds)))
        samples.append([] if rounds[-1] else [seconds])
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for turn in range(repetitions):
            for call, loop, wanted, seen in zip(calls, loops, rounds, samples, strict=True):
                if turn < wanted:
                    seen.append(_sample(call, loop))
    finally:
        if collecting:
            gc.enable()
    return [_summary(seen) for seen in samples]


def _sample(call: Callable[[], Any], loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops


def _summary(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return Timing(median, low, high, min(samples), len(samples))

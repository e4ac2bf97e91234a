"""The roofline: the least time that a machine's two ceilings allow a piece of work, and how near a measurement comes.

Arithmetic cannot be done faster than the best matrix product, nor memory moved faster than the best stream, so

    least seconds = max(flops / matmul rate, bytes / stream rate)

and the larger of the two names the bound. The rates are measured in the rounds of what is held against them, with the
same threads. Data that fits into a cache moves faster than the stream does; a small case bound by `stream` may
therefore reach more than all of its ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass

MATMUL, STREAM = "matmul", "stream"


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two), and bytes that must be read or written."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        """Both counts, multiplied."""
        return Work(factor * self.flops, factor * self.bytes)


@dataclass(frozen=True)
class Rates:
    """A machine's ceilings: floating-point operations and bytes per second."""

    matmul: float
    stream: float


@dataclass(frozen=True)
class Roof:
    """The ceiling over one measurement: what was counted, the bound that applies, and the fraction reached."""

    flops: float
    bytes: float
    bound: str
    seconds: float
    reached: float


def roof(work: Work, rates: Rates, seconds: float) -> Roof:
    """The ceiling of `work`, which took `seconds`.

    >>> roof(Work(flops=4e9, bytes=1e9), Rates(matmul=1e11, stream=1e10), 0.2)
    Roof(flops=4000000000.0, bytes=1000000000.0, bound='stream', seconds=0.1, reached=0.5)
    """
    computing, moving = work.flops / rates.matmul, work.bytes / rates.stream
    least = max(computing, moving)
    return Roof(work.flops, work.bytes, MATMUL if computing >= moving else STREAM, least, least / seconds)

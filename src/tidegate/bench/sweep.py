"""What the sweeps over lengths share: candidates take turns with the machine's ceilings and are held against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tidegate.bench import machine
from tidegate.bench.report import Measurement
from tidegate.bench.roofline import Rates, Work, roof
from tidegate.bench.timing import interleaved

Call = Callable[[], object]
COARSE = {"ceiling_size": 256, "stream_elements": 1 << 18}  # sizes of the ceilings' calls where precision is no matter


@dataclass(frozen=True)
class Candidate:
    """One thing at one length: its two calls, and what each of them must do (`training` includes the forward)."""

    name: str
    batch: int
    length: int
    forward: Call
    training: Call
    forward_work: Work
    training_work: Work
    parameters: int = 0


def measure(
    candidates: Sequence[Candidate], ceilings: tuple[machine.Work, machine.Work], repetitions: int, patience: float
) -> list[Measurement]:
    """Time all candidates and both ceilings in the same rounds, on the threads that PyTorch uses now."""
    calls = [call for candidate in candidates for call in (candidate.forward, candidate.training)]
    timings = interleaved([call for call, _ in ceilings] + calls, repetitions, patience=patience)
    matmul, stream = (amount / timing.median for (_, amount), timing in zip(ceilings, timings, strict=False))
    rates = Rates(matmul, stream)
    return [
        Measurement(
            candidate.name,
            candidate.length,
            candidate.batch * candidate.length,
            forward,
            training,
            candidate.batch,
            torch.get_num_threads(),
            rates,
            roof(candidate.forward_work, rates, forward.median),
            roof(candidate.training_work, rates, training.median),
            candidate.parameters,
        )
        for candidate, forward, training in zip(candidates, timings[2::2], timings[3::2], strict=True)
    ]

"""What this machine is and what it can do at best: the ceilings every other figure is held against."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tidegate.bench.timing import interleaved

Work = tuple[Callable[[], Any], float]  # a call, and how many operations or bytes one call is


def matmul(size: int = 1536) -> Work:
    """A float32 product of two square matrices, and its floating-point operations."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def stream(elements: int = 1 << 25) -> Work:
    """The stream triad a = b + s * c on float32 arrays far larger than a cache, and the bytes it reads and writes."""
    a, b, c = torch.empty(elements), torch.ones(elements), torch.ones(elements)
    return lambda: torch.add(b, c, alpha=0.5, out=a), 12.0 * elements


def ceilings(*, ceiling_size: int = 1536, stream_elements: int = 1 << 25) -> tuple[Work, Work]:
    """The two ceilings of `tidegate.bench.roofline`: a matrix product of that size and a stream of that length."""
    return matmul(ceiling_size), stream(stream_elements)


def matmul_gflops(repetitions: int = 9, *, size: int = 1536) -> float:
    """The fastest float32 matrix product of several, in GFLOP/s on the threads PyTorch uses."""
    call, flops = matmul(size)
    return flops / interleaved([call], repetitions)[0].best / 1e9


def stream_gbs(repetitions: int = 9, *, elements: int = 1 << 25) -> float:
    """The fastest stream triad of several, in GB/s on the threads PyTorch uses."""
    call, moved = stream(elements)
    return moved / interleaved([call], repetitions)[0].best / 1e9


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` threads inside the block (None: as many as PyTorch already uses)."""
    if count is not None and count < 1:
        raise ValueError(f"threads: seen {count}, wanted at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def vector_extensions() -> list[str]:
    """The wide instruction sets of this processor, narrowest first."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "amx-tile": "AMX", "neon": "NEON", "sve": "SVE"}
    return [label for feature, label in known.items() if features.get(feature)]


def describe() -> dict[str, Any]:
    """Versions, processor, cores and threads: what a measurement must name to mean anything."""
    import numba

    from tidegate import __version__

    return {
        "tidegate": __version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "simd": vector_extensions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"

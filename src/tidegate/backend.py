"""Which implementation of an op runs: one decision, in one place, by device and dtype alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import tidegate` needs this module, and must not wait a second for PyTorch
    import torch
    from torch import Tensor

BACKENDS = ("reference", "parallel", "numba")
POINTWISE_WORTHWHILE = 1 << 12  # elements from which one kernel beats the few PyTorch calls it stands for
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block with one implementation.

    `"reference"` is the paper's equation as a loop over time, `"parallel"` the chunked PyTorch form (any device, any
    dtype, differentiable twice), `"numba"` the fused CPU kernel. Raises ValueError for any other name. The choice holds
    for the whole process, all its threads, so that compiled code sees it too.

    >>> import tidegate, torch
    >>> with tidegate.backend("reference"):
    ...     h, state = tidegate.ops.scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
    >>> h.flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: seen {name!r}, wanted one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def mapped() -> bool:
    """Whether this runs inside of torch.vmap or another transform of torch.func."""
    import torch

    return torch._C._functorch.peek_interpreter_stack() is not None


def sees_values(tensor: Tensor) -> bool:
    """Whether what is computed may depend on the numbers in `tensor`: not in traces and transforms, nor without any."""
    import torch

    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not (traced or mapped() or tensor.is_meta)


def choose(tensor: Tensor, *, worthwhile: int = 0) -> str:
    """The backend for an op whose main input is `tensor`.

    For fewer elements than `worthwhile`, an op that is a handful of PyTorch calls takes those: they begin sooner.
    """
    import torch

    if _forced:
        return _forced
    if torch.compiler.is_exporting():
        return "reference"  # as one scan operator over time (ops/loop.py): plain PyTorch, small, any length
    if not torch.compiler.is_compiling() and mapped():
        return "parallel"  # torch.vmap and torch.func cannot see into a kernel
    if worthwhile and not torch.compiler.is_compiling() and tensor.numel() < worthwhile:
        return "parallel"
    return explain(tensor.device.type, tensor.dtype)[0]


def explain(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend chosen for a device and dtype, and the reason; what `tidegate doctor` prints."""
    import torch

    if device != "cpu":
        return "parallel", f"no fused kernels for {device}; the chunked PyTorch form runs on any device"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        return "parallel", f"fused kernels compute in float32; {dtype} takes the chunked PyTorch form"
    return "numba", "fused CPU kernels"

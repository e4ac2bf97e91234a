"""RMS norm and gate in one pass: what stands between a recurrence and its output projection."""

from __future__ import annotations

from torch import Tensor

from tidegate.backend import POINTWISE_WORTHWHILE, choose

__all__ = ["gated_norm"]

ACTIVATIONS = ("silu", "sigmoid")


def gated_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) * f(gate), the mean over the last axis, f = `activation`.

    With `norm_before_gate=False` the gate comes first, as in Mamba-2: y = weight * rms_norm(x * f(gate)). Without
    `gate` or `weight` that factor is left out. f is "silu" or "sigmoid".

    Shapes: x, y (..., V), or (..., H, V) with heads; weight (V,), or (H, V) for weights of each head's own; gate as x.
    y has the dtype of x; half precision is computed in float32.

    Raises ValueError for shapes that do not fit and unknown activations. Source: RMSNorm, arXiv 1910.07467; the gate
    behind it, RetNet, arXiv 2307.08621.

    >>> import torch
    >>> gated_norm(torch.tensor([3.0, 4.0]), eps=0.0).square().mean().item()
    1.0
    >>> gated_norm(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 50.0]), torch.tensor([2.0, 2.0]), activation="sigmoid")
    tensor([1.0000, 2.0000])
    """
    _check(x, gate, weight, activation)
    weight = None if weight is None else weight.to(x.dtype)
    gate = None if gate is None else gate.to(x.dtype)
    if choose(x, worthwhile=POINTWISE_WORTHWHILE) == "numba":
        from tidegate.ops.gated_norm.numba_cpu import gated_norm as implementation
    else:
        from tidegate.ops.gated_norm.parallel import gated_norm as implementation
    return implementation(x, gate, weight, eps, activation, norm_before_gate)


def _check(x: Tensor, gate: Tensor | None, weight: Tensor | None, activation: str) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x: seen {x.dtype} {tuple(x.shape)}, wanted real floating-point numbers (..., V)")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate: seen shape {tuple(gate.shape)}, wanted that of x, {tuple(x.shape)}")
    if weight is not None and (weight.ndim not in (1, 2) or weight.shape != x.shape[x.ndim - weight.ndim :]):
        raise ValueError(
            f"weight: seen shape {tuple(weight.shape)}, wanted the last axis of x or the last two, "
            f"which has shape {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: seen {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")

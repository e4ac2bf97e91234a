"""What stands before and behind RWKV-7's recurrence, each in one pass over memory."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from tidegate.backend import POINTWISE_WORTHWHILE, choose

__all__ = ["rwkv7_keys", "rwkv7_output"]


def rwkv7_keys(
    k: Tensor, logits: Tensor, k_k: Tensor, k_a: Tensor, *, rate: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The key that is written and the two vectors that remove, from a key and its learning rate.

    Equation, per head, a = sigmoid(logits)::

        removed = k * k_k / sqrt(sum (k * k_k)^2 + 1e-12)
        results:  k * (1 + (a - 1) * k_a),   -removed,   rate * a * removed

    Shapes: k, logits and the results (B, T, H, N); k_k, k_a (H, N).

    Raises ValueError for shapes that do not fit. Source: arXiv 2503.14456.

    >>> import torch
    >>> key, reads, writes = rwkv7_keys(*torch.ones(2, 1, 1, 1, 4), *torch.ones(2, 1, 4))
    >>> reads.flatten().tolist()
    [-0.5, -0.5, -0.5, -0.5]
    """
    _check(k, logits=logits)
    for name, x in (("k_k", k_k), ("k_a", k_a)):
        if x.shape != k.shape[2:]:
            raise ValueError(f"{name}: seen shape {tuple(x.shape)}, wanted (heads, dim) = {tuple(k.shape[2:])}")
    return _form(k).rwkv7_keys(k, logits, k_k, k_a, rate)


def rwkv7_output(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """y = (GroupNorm(o) + (sum_n r * k * bonus) v) * gate, a group being a head and eps 1e-5 N.

    Shapes: o, r, k, v, gate, y (B, T, H, N); bonus, weight and bias of the norm (H, N).

    Raises ValueError for shapes that do not fit. Source: arXiv 2503.14456.

    >>> import torch
    >>> o, zeros = torch.tensor([[[[3.0, 5.0]]]]), torch.zeros(1, 1, 1, 2)
    >>> rwkv7_output(o, zeros, zeros, zeros, zeros + 1, *zeros[0], *zeros[0] + 1, *zeros[0]).round().flatten().tolist()
    [-1.0, 1.0]
    """
    _check(o, r=r, k=k, v=v, gate=gate)
    for name, x in (("bonus", bonus), ("weight", weight), ("bias", bias)):
        if x.shape != o.shape[2:]:
            raise ValueError(f"{name}: seen shape {tuple(x.shape)}, wanted (heads, dim) = {tuple(o.shape[2:])}")
    return _form(o).rwkv7_output(o, r, k, v, gate, bonus, weight, bias)


def _check(first: Tensor, **others: Tensor) -> None:
    if first.ndim != 4:
        raise ValueError(f"first argument: seen shape {tuple(first.shape)}, wanted (batch, time, heads, dim)")
    for name, x in others.items():
        if x.shape != first.shape:
            raise ValueError(f"{name}: seen shape {tuple(x.shape)}, wanted {tuple(first.shape)}")


def _form(x: Tensor) -> ModuleType:
    if choose(x, worthwhile=POINTWISE_WORTHWHILE) == "numba":
        from tidegate.ops.rwkv7 import numba_cpu

        return numba_cpu
    from tidegate.ops.rwkv7 import parallel

    return parallel

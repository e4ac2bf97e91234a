"""Elementwise parts of layers, each in one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tidegate.backend import POINTWISE_WORTHWHILE, choose

__all__ = ["elu_plus_one", "log_sigmoid", "rotate", "swiglu", "token_mix"]


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where x (..., 2 D) holds gate and up side by side; returns (..., D).

    Raises ValueError for an odd number of channels. Source: Shazeer 2020, arXiv 2002.05202.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 100.0, 7.0, 2.0])).tolist()
    [0.0, 200.0]
    """
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (..., 2 * dim)")
    return _form(x).swiglu(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, which is exp(x) for x < 0 and x + 1 above: linear attention's feature map, arXiv 2006.16236.

    >>> import torch
    >>> elu_plus_one(torch.tensor([-100.0, 0.0, 2.0])).tolist()
    [0.0, 1.0, 3.0]
    """
    return _form(x).elu_plus_one(x)


def log_sigmoid(x: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """scale * log(sigmoid(x + bias)), a decay's logarithm from a gate's logits.

    Shapes: x (..., D); bias (D,). The result is float32 at least: a decay of 0.999 has no room in half precision.

    Raises ValueError for shapes that do not fit.

    >>> import torch
    >>> log_sigmoid(torch.tensor([-100.0, 900.0]), torch.zeros(2), 0.5).tolist()
    [-50.0, 0.0]
    """
    if x.ndim < 1 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias: seen shape {tuple(bias.shape)}, wanted the last axis of x, {tuple(x.shape)}")
    return _form(x).log_sigmoid(x, bias, scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by an angle: (x_i cos - x_{i + D/2} sin, x_{i + D/2} cos + x_i sin).

    Shapes: x (B, T, H, D), D even; cos, sin (B or 1, T, D/2), shared by the heads, through which no gradient flows.

    Raises ValueError for shapes that do not fit. Source: rotary embedding, arXiv 2104.09864.

    >>> import torch
    >>> rotate(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).flatten().tolist()
    [0.0, 1.0]
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, heads, dim) with dim even")
    batch, time, _, dim = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 3 or table.shape[0] not in (1, batch) or tuple(table.shape[1:]) != (time, dim // 2):
            raise ValueError(
                f"{name}: seen shape {tuple(table.shape)}, wanted (batch={batch} or 1, {time}, {dim // 2})"
            )
    return _form(x).rotate(x, cos, sin)


def token_mix(x: Tensor, shifted: Tensor, mix: Tensor) -> list[Tensor]:
    """x + (shifted - x) * mix_m for each of the M rows of `mix`: RWKV's views of a token and the one before.

    Shapes: x, shifted and every result (B, T, D); mix (M, D).

    Raises ValueError for shapes that do not fit. Source: arXiv 2305.13048.

    >>> import torch
    >>> [y.item() for y in token_mix(torch.full((1, 1, 1), 4.0), torch.zeros(1, 1, 1), torch.tensor([[0.0], [0.5]]))]
    [4.0, 2.0]
    """
    if x.ndim != 3 or shifted.shape != x.shape or mix.ndim != 2 or mix.shape[1] != x.shape[2]:
        raise ValueError(
            f"x, shifted, mix: seen shapes {tuple(x.shape)}, {tuple(shifted.shape)} and {tuple(mix.shape)}, wanted "
            "twice (batch, time, dim) and (views, dim)"
        )
    return _form(x).token_mix(x, shifted, mix)


def _form(x: Tensor) -> Any:
    if choose(x, worthwhile=POINTWISE_WORTHWHILE) == "numba":
        from tidegate.ops.pointwise import numba_cpu

        return numba_cpu.direct
    from tidegate.ops.pointwise import parallel

    return parallel

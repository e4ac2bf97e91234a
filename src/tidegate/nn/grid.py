"""Convolutions over grids (images, volumes) whose kernels are products of one state space model per axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.state_space import DiagonalSystem, kernel
from tidegate.ops.long_convolution import long_convolution, two_sided_convolution

PerAxis = float | Sequence[float]


class GridConvolution(nn.Module):
    """S4ND without a time axis: a depthwise convolution over `axes` axes, as large as the grid.

    Equation, with k_j^a the kernel of the diagonal state space model of axis a, rank r and lags n_a::

        y = K * x + skip * x,      K(n_1, ..., n_A) = 1/r sum_{j<r} prod_a k_j^a(n_a)
        k^a(n) = k_+(n) for n >= 0,  k_-(-n - 1) for n < 0          two-sided; one-sided, 0 for n < 0

    - Every pixel sees the whole grid, in A passes along one axis each. A product of kernels needs no A-dimensional FFT.
    - `two_sided` may be given for each axis; so may `dt_min` and `dt_max`, whose inverse is about the reach in pixels.
    - The kernels are samples of continuous functions. `layer(x, rate=0.5)` runs it at twice the resolution: the steps
      are multiplied by the rate, which may also be one number per axis.
    - `bandlimit` leaves out the states that turn `bandlimit / 2` times per step or more, at rate 1: with 1 those that
      the grid cannot tell from slower ones, which would come out as something else on a finer grid.
    - The kernel of lag -1 is k_-(0), as in the official code: u is held over a step (rule "zoh") and y is read at its
      end, where the step after begins.

    Initialisation: that of `DiagonalSystem`, steps log-uniform in [dt_min, dt_max]; skip ~ N(0, 1).
    Source: S4ND, arXiv 2210.06583. Shapes: x, y (B, T_1, ..., T_A, dim), channels last, any T_a >= 1.

    >>> layer = GridConvolution(8, axes=2, state_dim=16)
    >>> layer(torch.randn(2, 12, 20, 8)).shape, layer(torch.randn(2, 24, 40, 8), rate=0.5).shape
    (torch.Size([2, 12, 20, 8]), torch.Size([2, 24, 40, 8]))
    """

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        *,
        state_dim: int = 64,
        rank: int = 1,
        two_sided: bool | Sequence[bool] = True,
        init: str = "legs",
        rule: str = "zoh",
        dt_min: PerAxis = 0.1,
        dt_max: PerAxis = 1.0,
        num_systems: int | None = None,
        bandlimit: float | None = None,
        skip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if axes < 1:
            raise ValueError(f"axes: seen {axes}, wanted at least 1")
        if rank < 1:
            raise ValueError(f"rank: seen {rank}, wanted at least 1")
        if rule == "trapezoid":
            raise ValueError("rule: seen 'trapezoid', wanted 'zoh', 'bilinear' or 'dirac', whose kernels have one part")
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"bandlimit: seen {bandlimit}, wanted more than 0, or None for all states")
        self.dim, self.axes, self.rank, self.bandlimit = dim, axes, rank, bandlimit
        self.two_sided = tuple(bool(x) for x in per_axis("two_sided", two_sided, axes))
        lows, highs = per_axis("dt_min", dt_min, axes), per_axis("dt_max", dt_max, axes)
        system: dict[str, Any] = {"state_dim": state_dim, "init": init, "rule": rule, "num_systems": num_systems}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.systems = nn.ModuleList(
            DiagonalSystem((2 if both else 1) * rank * dim, dt_min=low, dt_max=high, **system, **factory)
            for both, low, high in zip(self.two_sided, lows, highs, strict=True)
        )
        self.skip = nn.Parameter(torch.empty(dim, **factory)) if skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        for system in self.systems:
            system.reset_parameters()  # type: ignore[operator]
        if self.skip is not None:
            nn.init.normal_(self.skip)

    def kernels(self, axis: int, size: int, rate: float = 1.0) -> Tensor:
        """The model of one axis at lags 0 ... size - 1: (rank * dim, size), and as much again where it is two-sided."""
        system: Any = self.systems[axis]
        decay, B, C = system.discretised(rate)
        weight = B * C
        if self.bandlimit is not None:
            weight = torch.where(system.frequencies() < self.bandlimit / 2, weight, 0)
        return kernel(decay, weight, size)

    def terms(self, x: Tensor, rate: PerAxis = 1.0) -> Tensor:
        """The r terms of K * x before their mean is taken: (..., rank, dim)."""
        if x.ndim != self.axes + 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x: seen shape {tuple(x.shape)}, wanted (batch, {self.axes} sizes of the grid, dim={self.dim})"
            )
        y = copies(x, self.rank)
        for axis, own in enumerate(per_axis("rate", rate, self.axes)):
            if not own > 0:
                raise ValueError(f"rate: seen {own}, wanted more than 0")
            rows = y.movedim(axis + 1, -2)  # (..., T, rank * dim)
            flat, taps = rows.reshape(-1, *rows.shape[-2:]), self.kernels(axis, rows.shape[-2], own)
            if self.two_sided[axis]:
                filter, future = taps.chunk(2)
                flat = two_sided_convolution(flat, filter, future)
            else:
                flat, _ = long_convolution(flat, taps)
            y = flat.view(rows.shape).movedim(-2, axis + 1)
        return y.unflatten(-1, (self.rank, self.dim))

    def forward(self, x: Tensor, rate: PerAxis = 1.0) -> Tensor:
        y = self.terms(x, rate).mean(-2)
        return y if self.skip is None else torch.addcmul(y, self.skip, x)

    def extra_repr(self) -> str:
        return f"{self.dim}, axes={self.axes}, rank={self.rank}, two_sided={self.two_sided}, bandlimit={self.bandlimit}"


def copies(x: Tensor, count: int) -> Tensor:
    """(..., D) -> (..., count * D), the same again and again."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], count, x.shape[-1]).flatten(-2)


def per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    """One value for each axis, from one for all or a list. Raises ValueError for a list of another length."""
    if not isinstance(value, Sequence):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name}: seen {len(value)} values, wanted one, or one for each of {axes} axes")
    return tuple(value)

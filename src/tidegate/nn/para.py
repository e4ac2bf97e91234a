"""What ParaGRU and ParaLSTM share: inputs by head, one number per channel and gate for the state, the block around."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellLayer
from tidegate.nn.parts import HeadNorm, ShortConvolution, check_heads
from tidegate.ops.cell import Cell
from tidegate.segments import Segments
from tidegate.state import State


class ParaMixer(CellLayer):
    """A cell whose channels see one another only in its input; a subclass gives the cell.

    Parameters, for G inputs and V vectors of the cell, E = expand dim channels in H heads: `weight_ih` (G, H, E / H,
    E / H), (out, in); `bias_ih` (G, E); `vectors` (V, E). In the block `in_proj`, rows for the cell and then for the
    gate, `convolution`, `norm` and `o_proj`.
    """

    num_heads: int
    expand: float
    block: bool
    conv_width: int | None
    recurrent_std: float | None
    recurrent_limit: float | None
    norm_eps: float
    no_weight_decay = ("vectors", "bias_ih")

    def _build(self, cell: Cell, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.cell = cell
        self.head_dim = check_heads(self.dim, self.num_heads, self.expand, "expand")
        self.width = self.num_heads * self.head_dim
        if not self.block and self.width != self.dim:
            raise ValueError(f"expand: seen {self.expand:g}, wanted 1 without the block, whose projections widen")
        if self.conv_width is not None and self.conv_width < 1:
            raise ValueError(f"conv_width: seen {self.conv_width}, wanted at least 1, or None for no convolution")
        for name in ("recurrent_std", "recurrent_limit"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: seen {value}, wanted more than 0, or None")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(self.dim, 2 * self.width, bias=False, **factory) if self.block else None
        conv_width = self.conv_width
        self.convolution = (
            None if conv_width is None else ShortConvolution(self.width, conv_width, bias=True, **factory)
        )
        shape = (len(cell.inputs), self.num_heads, self.head_dim, self.head_dim)
        self.weight_ih = nn.Parameter(torch.empty(shape, **factory))
        self.bias_ih = nn.Parameter(torch.empty(len(cell.inputs), self.width, **factory))
        self.vectors = nn.Parameter(torch.empty(len(cell.vectors), self.width, **factory))
        self.norm = HeadNorm(self.width, eps=self.norm_eps, **factory) if self.block else None
        self.o_proj = nn.Linear(self.width, self.dim, bias=False, **factory) if self.block else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W as torch.nn.Linear, b zero, the vectors a normal distribution cut at `recurrent_limit`."""
        super().reset_parameters()
        bound, std = self.head_dim**-0.5, self.recurrent_std or self.head_dim**-0.5
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.zeros_(self.bias_ih)
        limit = self.recurrent_limit or math.inf
        nn.init.trunc_normal_(self.vectors, std=std, a=-min(limit, 4 * std), b=min(limit, 4 * std))

    @torch.no_grad()
    def constrain_(self) -> None:
        """Clip the vectors to ±recurrent_limit, if there is one."""
        if self.recurrent_limit is not None:
            self.vectors.clamp_(-self.recurrent_limit, self.recurrent_limit)

    def state_spec(self) -> dict[str, Any]:
        tail = {} if self.conv_width is None else {"convolution": ((self.conv_width - 1, self.width), "input")}
        return {**tail, **{name: (self.width,) for name in self.cell.states}}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        u, gate = (x, None) if self.in_proj is None else self.in_proj(x).chunk(2, -1)
        tail = {}
        if self.convolution is not None:
            u, tail["convolution"] = self.convolution(u, state["convolution"], segments)
        inputs = torch.einsum("bthi,ghji->btghj", u.unflatten(-1, (self.num_heads, -1)), self.weight_ih).flatten(-2)
        y, after = self.over_time(inputs + self.bias_ih, None, self.vectors, state, segments)
        if self.norm is not None and self.o_proj is not None:
            y = self.o_proj(self.norm(y.unsqueeze(2), gate))
        return y, State(**tail, **after)

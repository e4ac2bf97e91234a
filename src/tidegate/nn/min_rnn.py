"""What the minGRU and the minLSTM share: gates that see the input alone, and a candidate that they average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.ops import scan
from tidegate.segments import Segments
from tidegate.state import State

CANDIDATES = ("positive", "linear")


class MinRNN(Mixer):
    """h_t = keep_t * h_{t-1} + write_t * candidate_t, all three from x_t; a subclass says how from the gates' logits.

    Parameters: `input_proj`, rows for the candidate and then for each gate; `o_proj` where the width is not dim.
    State: memory (width).
    """

    gates: int  # blocks of rows in `input_proj` behind the candidate's
    dim: int
    expand: float
    candidate: str
    bias: bool
    forget_bias: float

    def _build(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        width = self.expand * self.dim
        if width < 1 or width != int(width):
            raise ValueError(f"expand: {self.expand:g} * dim = {width:g} channels, wanted a whole number")
        if self.candidate not in CANDIDATES:
            raise ValueError(f"candidate: seen {self.candidate!r}, wanted 'positive' or 'linear'")
        if self.forget_bias and not self.bias:
            raise ValueError(f"forget_bias: seen {self.forget_bias:g}, wanted 0 without bias")
        self.width = int(width)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_proj = nn.Linear(self.dim, (1 + self.gates) * self.width, bias=self.bias, **factory)
        same = self.width == self.dim
        self.o_proj = None if same else nn.Linear(self.width, self.dim, bias=False, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights uniform in ±fan_in^(-1/2), as in PyTorch; biases zero, but for the gate that keeps."""
        for part in (self.input_proj, self.o_proj):
            if part is not None:
                nn.init.uniform_(part.weight, -1 / math.sqrt(part.in_features), 1 / math.sqrt(part.in_features))
        if self.bias:
            nn.init.zeros_(self.input_proj.bias)
            self._set_forget_bias(self.input_proj.bias.unflatten(0, (-1, self.width))[1:])

    def _set_forget_bias(self, biases: Tensor) -> None:
        """Write `forget_bias` into the gates' biases (gates, width), which are zero."""
        raise NotImplementedError

    def _coefficients(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """keep and write (B, T, width) from the gates' logits."""
        raise NotImplementedError

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.width,)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        # Near 1 a gate has no room in half precision.
        candidate, *logits = self.input_proj(x).to(accumulation_dtype(x.dtype)).chunk(1 + self.gates, -1)
        if self.candidate == "positive":
            candidate = positive(candidate)
        keep, write = self._coefficients(tuple(logits))
        h, memory = scan(keep, write * candidate, state=state["memory"], segments=segments)
        y = h.to(x.dtype)
        return y if self.o_proj is None else self.o_proj(y), State(memory=memory)


def positive(x: Tensor) -> Tensor:
    """x + 1/2 for x >= 0 and sigmoid(x) below: continuous, and never zero or negative."""
    return functional.relu(x) + torch.sigmoid(x.clamp(max=0))

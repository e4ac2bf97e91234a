"""RWKV's feed-forward part, which looks one token back and so has a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.nn.orthogonal import orthogonal_
from tidegate.nn.parts import token_shift
from tidegate.segments import Segments
from tidegate.state import State


class ChannelMix(Mixer):
    """RWKV-7 channel mixing: y_t = relu((x_t + (x_{t-1} - x_t) mix) W_in)^2 W_out.

    No receptance gate (RWKV-4 to 6 have one). x_{t-1} is the previous real token of the same document.

    Source: arXiv 2503.14456. Shapes: x, y (B, T, dim); hidden is 4 dim unless given. State: x_prev (dim).
    """

    no_weight_decay = ("mix",)

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= layer_index < num_layers:
            raise ValueError(f"layer_index: seen {layer_index}, wanted 0 <= layer_index < num_layers = {num_layers}")
        self.dim, self.hidden, self.layer_index, self.num_layers = dim, hidden, layer_index, num_layers
        self.mix = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.in_proj = nn.Linear(dim, hidden or 4 * dim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden or 4 * dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors train it: orthogonal in, zero out, less of the past in deeper layers."""
        shallow = 1 - self.layer_index / self.num_layers
        self.mix.copy_(1 - (torch.arange(self.dim, dtype=torch.float64) / self.dim) ** shallow**4)
        orthogonal_(self.in_proj.weight)
        self.out_proj.weight.zero_()

    def state_spec(self):
        return {"x_prev": ((self.dim,), "input")}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        shifted, x_prev = token_shift(x, state["x_prev"], segments)
        hidden = self.in_proj(torch.addcmul(x, shifted - x, self.mix))
        return self.out_proj(hidden.relu().square()), State(x_prev=x_prev)

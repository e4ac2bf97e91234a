"""The feed-forward half of a block, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tidegate.nn.channel_mix import ChannelMix
from tidegate.nn.parts import SwiGLU
from tidegate.registry import did_you_mean

FEED_FORWARDS = ("swiglu", "gelu", "channel-mix", "none")


class GELU(nn.Module):
    """y = gelu(x W1) W2, without biases. x, y: (..., D)."""

    def __init__(self, dim: int, hidden: int | None = None, **factory: Any) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden or 4 * dim, bias=False, **factory)
        self.down = nn.Linear(hidden or 4 * dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def build(name: str, dim: int, hidden: int | None, *, layer_index: int, num_layers: int, **factory: Any) -> Any:
    """A feed-forward part; `channel-mix` has a state and is called as a mixer is. None for `none`."""
    if name == "swiglu":
        return SwiGLU(dim, hidden, **factory)
    if name == "gelu":
        return GELU(dim, hidden, **factory)
    if name == "channel-mix":
        return ChannelMix(dim, hidden=hidden, layer_index=layer_index, num_layers=num_layers, **factory)
    if name == "none":
        return None
    raise ValueError(
        f"feed_forward: there is no {name!r}{did_you_mean(name, FEED_FORWARDS)}; choose from {', '.join(FEED_FORWARDS)}"
    )

"""One layer of a stack: a mixer over time and a feed-forward part over channels, each on a residual branch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tidegate import registry
from tidegate.models import feed_forward as parts
from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import RMSNorm
from tidegate.segments import Segments
from tidegate.state import State


class Block(nn.Module):
    """x <- x + mixer(norm(x)); x <- x + feed_forward(norm(x)).

    Its state is `State(mixer=...)`, with `feed_forward=...` beside it where that part has a state of its own.
    A mixer whose `forward` takes `side` is given the dict that all layers of one call share.
    """

    def __init__(
        self,
        dim: int,
        name: str,
        options: Mapping[str, Any],
        *,
        feed_forward: str = "swiglu",
        feed_forward_dim: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        place = {"layer_index": layer_index, "num_layers": num_layers}
        takes = registry.info(name).options
        given = {key: value for key, value in place.items() if key in takes and key not in options}
        self.mixer_norm = RMSNorm(dim, eps=norm_eps, **factory)
        self.mixer = registry.build(name, dim, **given, **options, **factory)
        self.feed_forward = parts.build(feed_forward, dim, feed_forward_dim, **place, **factory)
        self.feed_forward_norm = None if self.feed_forward is None else RMSNorm(dim, eps=norm_eps, **factory)
        self.dropout = nn.Dropout(dropout)
        self.takes_side = "side" in inspect.signature(self.mixer.forward).parameters

    @property
    def stateful(self) -> tuple[str, ...]:
        """Names of the parts that have a state."""
        return ("mixer", "feed_forward") if isinstance(self.feed_forward, Mixer) else ("mixer",)

    def state_spec(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_spec() for name in self.stateful}

    def init_state(self, batch_size: int, **options: Any) -> State:
        """The state before the first token."""
        return State({name: getattr(self, name).init_state(batch_size, **options) for name in self.stateful})

    def forward(
        self, x: Tensor, state: State | None, segments: Segments | None, side: dict[str, Tensor]
    ) -> tuple[Tensor, State]:
        new: dict[str, Any] = {}
        shared = {"side": side} if self.takes_side else {}
        before = None if state is None else state["mixer"]
        y, new["mixer"] = self.mixer(self.mixer_norm(x), before, segments=segments, **shared)
        x = x + self.dropout(y)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            y = self.feed_forward_norm(x)
            if "feed_forward" in self.stateful:
                before = None if state is None else state["feed_forward"]
                y, new["feed_forward"] = self.feed_forward(y, before, segments=segments)
            else:
                y = self.feed_forward(y)
            x = x + self.dropout(y)
        return x, State(new)

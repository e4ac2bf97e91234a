"""Bidirectional: any mixer, once from the left and once from the right."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tidegate import registry
from tidegate.nn.mixer import Mixer
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

MERGES = ("sum", "concat", "gated")
_REVERSED = "reversed "  # before the names of what the layers that read from the right hand to each other


@register(
    "bidirectional",
    family="linear_attention",  # the default's; costs are counted by it
    paper="bidirectional",
    title="Bidirectional Recurrent Neural Networks (Schuster and Paliwal, 1997), around any mixer",
    tiny=dict(mixer="gla", options=dict(num_heads=2, conv_width=4), merge="gated"),
    exceptions={
        "causality": "every output depends on the tokens after it, which is what it is for",
        "streaming": "what is read from the right begins with the last token, so a sequence cannot come in pieces",
    },
)
class Bidirectional(Mixer):
    """Two mixers of one kind, one of which reads every document from its end.

    Equation, reverse turning each document round::

        l = mixer_1(x),   r = reverse(mixer_2(reverse(x)))
        sum:     y = l + r
        concat:  y = [l, r] W
        gated:   y = g * l + (1 - g) * r,   g = sigmoid(x W + b)

    - `mixer` is the name of any mixer that streams, `options` are its own. `shared=True` uses one mixer for both
      directions, with half the weights.
    - Both directions see the token itself.
    - It is neither causal nor can it be continued: for classifying, tagging and encoding (`models.SequenceModel`), not
      for predicting the next token, and `LanguageModel` refuses it. It keeps no state and takes none but an empty one.
    - Packed and padded documents are reversed one by one. A document that continues from an earlier call is read as if
      it began with this one.

    Initialisation: the mixers as they initialise themselves; W of "concat" as torch.nn.Linear; W and b of "gated" zero,
    so that both directions count alike at first.
    Source: Schuster and Paliwal, IEEE Transactions on Signal Processing 45, 1997. Shapes: x, y (B, T, dim).
    State: empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: str = "gla",
        options: Mapping[str, Any] | None = None,
        shared: bool = False,
        merge: str = "sum",
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.mixer, self.options, self.shared, self.merge = dim, mixer, options, shared, merge
        self.layer_index, self.num_layers = layer_index, num_layers
        known, own = registry.info(mixer), dict(options or {})
        if not known.streams:
            raise ValueError(f"mixer: {mixer!r} reads in both directions itself; wanted one that reads from the left")
        if reserved := {"dim", "device", "dtype"} & set(own):
            raise ValueError(f"options: {sorted(reserved)[0]!r} is an argument of its own, no option of {mixer!r}")
        if merge not in MERGES:
            raise ValueError(f"merge: seen {merge!r}, wanted one of {', '.join(MERGES)}")
        place = {"layer_index": layer_index, "num_layers": num_layers}
        given = {name: value for name, value in place.items() if name in known.options}

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.from_left = registry.build(mixer, dim, **{**given, **own}, **factory)
        self.from_right = None if shared else registry.build(mixer, dim, **{**given, **own}, **factory)
        self.takes_side = "side" in inspect.signature(self.from_left.forward).parameters
        self.merge_proj = nn.Linear(2 * dim, dim, bias=False, **factory) if merge == "concat" else None
        self.merge_gate = nn.Linear(dim, dim, **factory) if merge == "gated" else None
        self._even_gate()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        self._even_gate()

    def _even_gate(self) -> None:
        if self.merge_gate is not None:
            nn.init.zeros_(self.merge_gate.weight)
            nn.init.zeros_(self.merge_gate.bias)

    def state_spec(self) -> dict[str, Any]:
        return {}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        side: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        left = self._read(self.from_left, x, segments, side)
        turned = None if segments is None else segments.reversed()
        right = self._read(self.from_right or self.from_left, x.flip(1), turned, side, _REVERSED).flip(1)
        if self.merge_proj is not None:
            return self.merge_proj(torch.cat([left, right], -1)), state
        if self.merge_gate is not None:
            return right + torch.sigmoid(self.merge_gate(x)) * (left - right), state
        return left + right, state

    def _read(
        self, mixer: nn.Module, x: Tensor, segments: Segments | None, side: dict[str, Tensor] | None, prefix: str = ""
    ) -> Tensor:
        """The mixer's outputs; in `side`, each direction finds what the layers before left for it."""
        if side is None or not self.takes_side:
            return mixer(x, segments=segments)[0]
        own = {name.removeprefix(prefix): part for name, part in side.items() if name.startswith(prefix)}
        y = mixer(x, segments=segments, side=own)[0]
        side.update({prefix + name: part for name, part in own.items()})
        return y

"""SeqBoat: a moving average runs over every token, and its output decides which tokens enter an attention unit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.mixers.gated_attention_unit import ACTIVATIONS, GatedAttentionUnit
from tidegate.nn.ema import MovingAverage
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.rotary import token_positions
from tidegate.nn.routing import leaves_out
from tidegate.registry import register
from tidegate.segments import Segments, reorder, zero_padding
from tidegate.state import State

ROUTERS = ("softmax", "sigmoid")


@register(
    "seqboat",
    family="attention",
    paper="seqboat",
    title="Sparse Modular Activation for Efficient Sequence Modeling",
    arxiv="2306.11197",
    tiny=dict(state_dim=4, key_dim=16, expand=1.5, window=5, router_std=0.5),
    presets={
        "always-active": dict(always_active=True),
        "relu2": dict(kernel="relu2", positions="offset"),
    },
)
class SeqBoat(Mixer):
    """SeqBoat: a moving average, and attention among the tokens that it picks (sparse modular activation).

    Equation, act the activation and EMA a damped moving average (nn/ema.py) with N states per channel::

        m = act(EMA(x)),    u = m W_u + b_u,    p = softmax(u / tau)
        token t is active if p_1 > threshold:   h_t = p_1 GAU(active tokens so far, the last `window` of them)
        all others:                             h_t = 0
        y = m W_x + b_x + h

    - The unit (see gated-attention-unit) sees m, and of m the active tokens only, as if the others were not there. So
      its window reaches back as far as it takes to find `window` of them, and what is inactive costs it nothing: in
      eager mode active tokens are moved together first, while compiled and mapped programs mask the others.
    - No gradient flows through the decision, only through p_1. A token that is inactive is not taught to be active,
      and if all are, the router never learns: see whether `active_tokens` are none or all at the start, and then raise
      `router_std` (the official 0.02 is small for a small dim) or move `act_bias`, the active logit's starting bias.
    - `router`: "softmax" over two logits, or "sigmoid" of one. tau starts at temp_scale sqrt(dim), and is learnt unless
      `learn_temperature=False`. In half precision, the router reads float32.
    - `forward(..., active=mask)` decides from outside. `always_active` has no router, `attention=False` no unit.
    - `window` counts the token itself (the official code sees one more for the same number), `None` is without limit;
      `positions` "rotary" takes those among all tokens, "offset" the distance among the active ones.
    - Left to the model: norm, residual. The paper's y is inside of an activation there if the model is not causal.

    Initialisation (official code): weights N(0, 0.02) cut off at two deviations, biases 0, EMA as it says there.
    Source: arXiv 2306.11197. Shapes: x, y (B, T, dim); Z = key_dim, E = expand dim.
    State: average (dim, N); keys (window, 1, Z), values (window, 1, E) and length, the number, of active tokens;
    position, the tokens of the current document, if positions are rotary.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 16,
        key_dim: int = 128,
        expand: float = 2.0,
        window: int | None = 128,
        kernel: str = "softmax",
        positions: str = "rotary",
        activation: str = "silu",
        router: str = "softmax",
        threshold: float = 0.5,
        temp_scale: float = 1.0,
        learn_temperature: bool = True,
        router_std: float = 0.02,
        act_bias: float = 0.0,
        always_active: bool = False,
        attention: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.key_dim, self.expand, self.window = dim, state_dim, key_dim, expand, window
        self.kernel, self.positions, self.activation = kernel, positions, activation
        self.router, self.threshold, self.temp_scale = router, threshold, temp_scale
        self.learn_temperature, self.router_std, self.act_bias = learn_temperature, router_std, act_bias
        self.always_active, self.attention = always_active, attention
        if router not in ROUTERS:
            raise ValueError(f"router: seen {router!r}, wanted 'softmax' or 'sigmoid'")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: seen {threshold}, wanted a probability between 0 and 1")
        if temp_scale <= 0:
            raise ValueError(f"temp_scale: seen {temp_scale}, wanted more than 0")
        if router_std < 0:
            raise ValueError(f"router_std: seen {router_std}, wanted at least 0")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: seen {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.average = MovingAverage(dim, state_dim, **factory)
        self.x_proj = nn.Linear(dim, dim, **factory)
        self.unit = None
        if attention:
            options: dict[str, Any] = {"key_dim": key_dim, "expand": expand, "window": window, "kernel": kernel}
            options |= {"positions": positions, "activation": activation}
            self.unit = GatedAttentionUnit(dim, **options, **factory)
        routed = attention and not always_active
        self.router_proj = nn.Linear(dim, 2 if router == "softmax" else 1, **factory) if routed else None
        self.log_temperature = nn.Parameter(torch.empty((), **factory)) if routed and learn_temperature else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        self.average.reset_parameters()
        if self.unit is not None:
            self.unit.reset_parameters()
        nn.init.trunc_normal_(self.x_proj.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.x_proj.bias)
        if self.router_proj is not None:
            std = self.router_std
            nn.init.trunc_normal_(self.router_proj.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(self.router_proj.bias)
            self.router_proj.bias[-1] = self.act_bias
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, self._log_temperature())

    def _log_temperature(self) -> float:
        return math.log(self.temp_scale * math.sqrt(self.dim))

    def state_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"average": (self.dim, self.state_dim)}
        if self.unit is not None:
            spec |= self.unit.state_spec()
            if self.positions == "rotary":
                spec["position"] = ((), torch.int64)
        return spec

    @torch.no_grad()
    def active_tokens(self, x: Tensor, state: State | None = None, *, segments: Segments | None = None) -> Tensor:
        """Which tokens enter the attention unit, (B, T) bool; the mean over real tokens is the activation rate."""
        x, state = self.prepare(x, state, segments)
        m, _ = self._memory(x, state, segments)
        return self._decide(m, segments, None)[0]

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        active: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`active` (B, T) bool takes the place of the router's decisions, if there is a router."""
        fresh = state is None
        x, state = self.prepare(x, state, segments)
        if active is not None and active.shape != x.shape[:2]:
            raise ValueError(f"active: seen shape {tuple(active.shape)}, wanted (batch, time) = {tuple(x.shape[:2])}")
        new: dict[str, Any] = {}
        m, new["average"] = self._memory(x, state, segments)
        y = self.x_proj(m.to(x.dtype))
        if self.unit is not None:
            positions = None
            if self.positions == "rotary":
                positions, new["position"] = token_positions(x, state["position"], segments)
            past = None if fresh else State({name: state[name] for name in self.unit.state_spec()})
            chosen, weight = self._decide(m, segments, active)
            h, after = self._attend(self.unit, m.to(x.dtype), past, segments, chosen, positions)
            y = y + (h if weight is None else weight.to(x.dtype).unsqueeze(-1) * h)
            new |= after
        return zero_padding(y, segments), State({name: new[name] for name in self.state_spec()})

    def _memory(self, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """m, at least float32, so that decisions do not hang on roundings; and the average's state."""
        m, average = self.average(x.to(accumulation_dtype(x.dtype)), state["average"], segments)
        return ACTIVATIONS[self.activation](m), average

    def _decide(self, m: Tensor, segments: Segments | None, active: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Which tokens are active (B, T), and their p_1 (B, T), None for 1."""
        valid = torch.ones(m.shape[:2], dtype=torch.bool, device=m.device) if segments is None else segments.valid
        if self.router_proj is None:
            return valid if self.unit is not None else torch.zeros_like(valid), None
        logits = nn.functional.linear(m, self.router_proj.weight.to(m.dtype), self.router_proj.bias.to(m.dtype))
        lead = logits[..., 0] if self.router == "sigmoid" else logits[..., 1] - logits[..., 0]
        if self.log_temperature is None:
            lead = lead * math.exp(-self._log_temperature())
        else:
            lead = lead * torch.exp(-self.log_temperature.to(m.dtype))
        if active is None:
            active = lead > math.log(self.threshold / (1 - self.threshold))
        return active & valid, torch.sigmoid(lead)

    def _attend(
        self,
        unit: GatedAttentionUnit,
        m: Tensor,
        past: State | None,
        segments: Segments | None,
        active: Tensor,
        positions: Tensor | None,
    ) -> tuple[Tensor, State]:
        """The unit over the active tokens of m, zero for all others, and its state."""
        if self.router_proj is None:
            return unit(m, past, segments=segments, positions=positions)
        nothing = torch.zeros_like(active)
        # To the unit, what is inactive is padding.
        inner, emptied = (Segments(nothing, ~nothing) if segments is None else segments).routed(active)
        if leaves_out(m):
            h, after = _compressed(unit, m, past, inner, positions)
        else:
            h, after = unit(m, past, segments=inner, positions=positions)
        return h, after if segments is None else after.map(lambda leaf: _unless(emptied, leaf))


def _compressed(
    unit: GatedAttentionUnit, m: Tensor, past: State | None, segments: Segments, positions: Tensor | None
) -> tuple[Tensor, State]:
    """The unit on its real tokens alone, moved together and cut to the most that a row has."""
    length = int(segments.lengths().max()) if len(m) else 0
    if not length:
        return torch.zeros_like(m), past or unit.init_state(len(m), device=m.device, dtype=m.dtype)
    moved, order, place = segments.compacted()
    order, time = order[:, :length], m.shape[1]
    near = None if positions is None else reorder(positions.expand(segments.shape), order)
    h, after = unit(reorder(m, order), past, segments=moved[:length], positions=near)
    return reorder(nn.functional.pad(h, (0, 0, 0, time - length)), place), after


def _unless(emptied: Tensor, leaf: Tensor) -> Tensor:
    return torch.where(emptied.view(-1, *[1] * (leaf.ndim - 1)), 0, leaf)

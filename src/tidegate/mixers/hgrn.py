"""HGRN: an elementwise gated recurrence whose forget gate has a lower bound, higher in deeper layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution
from tidegate.ops import gated_norm, scan
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "hgrn",
    family="scan",
    paper="hybrid-linear-attention",
    title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
    arxiv="2311.04823",
    tiny=dict(layer_index=1, num_layers=3, expand=1.5),
    presets={
        "paper": dict(complex_state=True, bias=True, norm="layer", norm_before_gate=False, gate_activation="sigmoid"),
        "convolution": dict(conv_width=4),
    },
)
class HGRN(Mixer):
    """Hierarchically gated recurrent network (HGRN).

    Equation, E = expand * dim channels::

        lambda_t = gamma + (1 - gamma) sigmoid(x_t W_f)
        h_t = lambda_t * exp(i theta) * h_{t-1} + (1 - lambda_t) * silu(x_t W_i)
        y_t = (RMSNorm(h_t) * silu(x_t W_g)) W_o

    - gamma, the forget gate's lower bound, makes deep layers remember: at first layer_index / num_layers in every
      channel, 0 and not learnt in the first layer. The paper learns one table for all layers, whose softmax over
      layers, summed up, is gamma; here each layer has its own sigmoid(`lower_bound_logit`), which begins at the same
      values and can hold any table's, but need not grow with depth. `lower_bound` sets where gamma begins.
    - `complex_state`: h has E complex channels, each turned by a learnt angle theta, at first 10000^(-2 n / E); W_i
      and W_g have two columns for each, and silu, norm and gate act on real and imaginary part by themselves. Without
      it theta = 0 and h is real, as in later studies.
    - Preset "paper" is its code: complex, LayerNorm(h * sigmoid(x W_g)), biases. Norm, order and gate are options.
    - `conv_width` puts a short causal convolution on x W_i and x W_f.

    Initialisation: matrices N(0, 0.02), biases zero. Source: arXiv 2311.04823. Shapes: x, y (B, T, dim).
    State: convolution (conv_width - 1, its channels), if there is one; memory (E), complex with `complex_state`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        complex_state: bool = False,
        lower_bound: float | None = None,
        norm: str = "rms",
        norm_before_gate: bool = True,
        gate_activation: str = "silu",
        conv_width: int | None = None,
        bias: bool = False,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand, self.complex_state, self.lower_bound = dim, expand, complex_state, lower_bound
        self.norm, self.norm_before_gate, self.gate_activation = norm, norm_before_gate, gate_activation
        self.conv_width, self.bias, self.norm_eps = conv_width, bias, norm_eps
        self.layer_index, self.num_layers = layer_index, num_layers
        if expand * dim < 1 or expand * dim != int(expand * dim):
            raise ValueError(f"expand: {expand:g} * dim = {expand * dim:g} channels, wanted a whole number")
        if lower_bound is not None and not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound: seen {lower_bound}, wanted 0 <= lower_bound < 1, or None")
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm: seen {norm!r}, wanted 'rms' or 'layer'")
        if gate_activation not in ("silu", "sigmoid"):
            raise ValueError(f"gate_activation: seen {gate_activation!r}, wanted 'silu' or 'sigmoid'")
        if conv_width is not None and conv_width < 1:
            raise ValueError(f"conv_width: seen {conv_width}, wanted at least 1, or None")
        self.width = int(expand * dim)
        self.parts = 2 if complex_state else 1  # real numbers to a channel
        self.first_bound = layer_index / num_layers if lower_bound is None else lower_bound

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        values = self.parts * self.width
        self.fig_proj = nn.Linear(dim, self.width + 2 * values, bias=bias, **factory)
        self.convolution = (
            ShortConvolution(self.width + values, conv_width, activation=False, **factory) if conv_width else None
        )
        self.lower_bound_logit = nn.Parameter(torch.empty(self.width, **factory)) if self.first_bound else None
        self.theta = nn.Parameter(torch.empty(self.width, **factory)) if complex_state else None
        self.norm_weight = nn.Parameter(torch.empty(values, **factory))
        self.norm_bias = nn.Parameter(torch.empty(values, **factory)) if norm == "layer" else None
        self.o_proj = nn.Linear(values, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for part in (self.fig_proj, self.o_proj):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        if self.lower_bound_logit is not None:
            nn.init.constant_(self.lower_bound_logit, math.log(self.first_bound / (1 - self.first_bound)))
        if self.theta is not None:
            order = torch.arange(self.width, dtype=torch.float64, device=self.theta.device)
            self.theta.copy_(10000 ** (-2 * order / self.width))
        nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            nn.init.zeros_(self.norm_bias)

    def state_spec(self) -> dict[str, Any]:
        memory = {"memory": ((self.width,), "complex") if self.complex_state else (self.width,)}
        if self.convolution is None or not self.conv_width:
            return memory
        return {"convolution": ((self.conv_width - 1, self.convolution.dim), "input"), **memory}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        values, new = self.parts * self.width, {}
        recurrent, gate = self.fig_proj(x).split([self.width + values, values], -1)
        if self.convolution is not None:
            recurrent, new["convolution"] = self.convolution(recurrent, state["convolution"], segments)
        f, i = recurrent.to(accumulation_dtype(x.dtype)).split([self.width, values], -1)
        write = torch.sigmoid(-f)  # 1 - lambda
        if self.lower_bound_logit is not None:
            write = torch.sigmoid(-self.lower_bound_logit.to(f.dtype)) * write
        i = nn.functional.silu(i)
        if self.theta is None:
            decay, i = 1 - write, write * i
        else:
            decay, i = self._rotation(1 - write), torch.view_as_complex(write[..., None] * i.unflatten(-1, (-1, 2)))
        h, new["memory"] = scan(decay, i, state=state["memory"], segments=segments)
        if self.complex_state:
            h = torch.view_as_real(h).flatten(-2)
        return zero_padding(self.o_proj(self._gated_norm(h.to(x.dtype), gate)), segments), State(new)

    def _rotation(self, decay: Tensor) -> Tensor:
        """decay * exp(i theta), complex."""
        assert self.theta is not None
        theta = self.theta.to(decay.dtype)
        return torch.view_as_complex(decay[..., None] * torch.stack([theta.cos(), theta.sin()], -1))

    def _gated_norm(self, h: Tensor, gate: Tensor) -> Tensor:
        if self.norm == "rms":
            options: dict[str, Any] = {"activation": self.gate_activation, "norm_before_gate": self.norm_before_gate}
            return gated_norm(h, gate, self.norm_weight, eps=self.norm_eps, **options)
        gate = torch.sigmoid(gate) if self.gate_activation == "sigmoid" else nn.functional.silu(gate)
        if not self.norm_before_gate:
            h = h * gate
        h = nn.functional.layer_norm(h, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.norm_eps)
        return h * gate if self.norm_before_gate else h

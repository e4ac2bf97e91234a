"""The mLSTM block of the first xLSTM paper: widened before the memory, with a convolution and a gate around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.mixers.mlstm import (
    check_input_gate,
    check_shared_options,
    log_gates,
    memory_spec,
    norm_per_head,
    remember,
)
from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import ShortConvolution, check_heads, split_heads
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "mlstm-pre-up",
    family="linear_attention",
    paper="tfla-mlstm",
    title="xLSTM: Extended Long Short-Term Memory",
    arxiv="2405.04517",
    tiny=dict(num_heads=2, width_multiple=16),
    presets={"sigmoid": dict(input_gate="sigmoid")},
)
class MLSTMPreUp(Mixer):
    """The residual branch of xLSTM's mLSTM block: up-projection, convolution, memory, gate, down-projection.

    Equation (the memory per head as `mlstm` has it, W with blocks of `block_width` channels along its diagonal)::

        u, z = x W_up        c = silu(conv(u))        q, k = c W_q, c W_k        v = u W_v
        i~, f~ = [q, k, v] W_if + b
        h = LayerNorm_head(mlstm(q / sqrt(K), k, v, i~, log sigmoid(f~))) + skip * c
        y = (h * silu(z)) W_down

    - The paper's stack has no feed-forward layer between these (`feed_forward="none"` in a LanguageModel).
    - The width inside is expand dim, rounded up to a multiple of `width_multiple`.
    - `input_gate` and `normalise` are those of `mlstm`; this paper has the exponential gate.

    Initialisation (official code): gates zero but for their biases, linspace(`forget_bias`) over the heads and
    N(0, 0.1^2) for the input; skip 1; W_down N(0, (2 / (num_layers sqrt(dim)))^2), the other projections
    N(0, 2 / (5 dim)).
    Source: arXiv 2405.04517. Shapes: x, y (B, T, dim); K = V = width / num_heads.
    State: convolution (conv_width - 1, width), memory (H, K, V); with the normaliser also normaliser (H, K) and
    maximum (H).
    """

    no_weight_decay = ("gate_bias", "skip")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand: float = 2.0,
        width_multiple: int = 64,
        block_width: int = 4,
        conv_width: int = 4,
        input_gate: str = "exp",
        normalise: bool | None = None,
        gate_cap: float | None = None,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        norm: str = "layer",
        norm_eps: float = 1e-5,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand, self.width_multiple = dim, num_heads, expand, width_multiple
        self.block_width, self.conv_width, self.gate_cap, self.forget_bias = (
            block_width,
            conv_width,
            gate_cap,
            forget_bias,
        )
        self.input_gate, self.normalise = input_gate, normalise
        self.norm, self.norm_eps, self.num_layers = norm, norm_eps, num_layers
        self.width = -(-int(expand * dim) // width_multiple) * width_multiple
        self.head_dim = check_heads(self.width, num_heads)
        if self.width < 1 or self.width % block_width:
            raise ValueError(f"block_width: seen {block_width}, wanted a divisor of the width inside, {self.width}")
        check_shared_options(norm, gate_cap)
        self.normalised = check_input_gate(input_gate, normalise)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up_proj = nn.Linear(dim, 2 * self.width, bias=False, **factory)
        self.convolution = ShortConvolution(self.width, conv_width, bias=True, **factory)
        self.qkv_blocks = nn.Parameter(torch.empty(3, self.width // block_width, block_width, block_width, **factory))
        self.gates = nn.Linear(3 * self.width, 2 * num_heads, bias=False, **factory)
        self.gate_bias = nn.Parameter(torch.empty(2 * num_heads, **factory))  # input, forget
        self.norm_weight = nn.Parameter(torch.empty(self.width, **factory))
        self.skip = nn.Parameter(torch.empty(self.width, **factory))
        self.down_proj = nn.Linear(self.width, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for weight in (self.up_proj.weight, self.qkv_blocks):
            nn.init.normal_(weight, std=(2 / (5 * self.dim)) ** 0.5)
        nn.init.normal_(self.down_proj.weight, std=2 / (self.num_layers * self.dim**0.5))
        nn.init.zeros_(self.gates.weight)
        nn.init.normal_(self.gate_bias[: self.num_heads], std=0.1)
        self.gate_bias[self.num_heads :].copy_(torch.linspace(*self.forget_bias, self.num_heads))
        nn.init.ones_(self.norm_weight)
        nn.init.ones_(self.skip)
        self.convolution.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {
            "convolution": ((self.conv_width - 1, self.width), "input"),
            **memory_spec(self.num_heads, self.head_dim, self.head_dim, self.normalised),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        u, z = self.up_proj(x).chunk(2, -1)
        c, tail = self.convolution(u, state["convolution"], segments)
        q, k, v = (block_diagonal(part, w) for part, w in zip((c, c, u), self.qkv_blocks, strict=True))
        gates = log_gates(self.gates(torch.cat([q, k, v], -1)), self.gate_bias, self.gate_cap, self.input_gate)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        h, last = remember(q, k, v, *gates, state, segments)
        h = norm_per_head(h, self.norm_weight, self.norm, self.norm_eps) + self.skip * c
        return self.down_proj(h * functional.silu(z)), State(convolution=tail, **last)


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """x @ diag(blocks): x (B, T, N W), blocks (N, W, W)."""
    count, width = blocks.shape[:2]
    # Products of 4 channels are slower than the zeros of 64 (measured: 2.2 times): join blocks into larger ones.
    joined = math.gcd(count, max(1, 64 // width))
    parts = blocks.unflatten(0, (-1, joined))
    diagonal = torch.eye(joined, dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    wide = (parts[:, :, :, None, :] * diagonal).flatten(3, 4).flatten(1, 2)  # (N / joined, joined W, joined W)
    return torch.einsum("btni,nij->btnj", x.unflatten(-1, wide.shape[:2]), wide).flatten(-2)

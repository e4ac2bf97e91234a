"""Small parts that mixers and models share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import accumulation_dtype
from tidegate.ops import gated_norm, short_convolution
from tidegate.ops.pointwise import swiglu
from tidegate.segments import Segments


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, with its tail as state: `y, tail = conv(x, tail, segments)`.

    y_t = sum_j weight[:, j] * x_{t - (width - 1) + j} + bias, x, y (B, T, D), tail (B, width - 1, D); an optional
    SiLU follows. The window never reaches into another document and skips padding. With `dilation` d it sees every d-th
    token, y_t = sum_j weight[:, j] * x_{t - (width - 1 - j) d} + bias, and the tail is (width - 1) d tokens long.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: bool = True,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.width, self.activation, self.dilation = dim, width, activation, dilation
        self.weight = nn.Parameter(torch.empty(dim, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±width^(-1/2), as torch.nn.Conv1d with one input channel per group."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, tail: Tensor | None = None, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        activation = "silu" if self.activation else None
        weight: Tensor = self.weight
        if (gap := self.dilation - 1) > 0:  # zeros between the columns
            weight = nn.functional.pad(weight.unsqueeze(-1), (gap, 0)).flatten(1)[:, gap:]
        return short_convolution(x, weight, self.bias, activation=activation, state=tail, segments=segments)

    def extra_repr(self) -> str:
        return f"{self.dim}, width={self.width}, bias={self.bias is not None}, activation={self.activation}"


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis in one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        return gated_norm(x, weight=self.weight, eps=self.eps or 0.0)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head, times silu(gate) or sigmoid(gate): o (B, T, H, V), gate (B, T, H * V) or None.

    Gives (B, T, H * V).
    """

    def forward(self, o: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        gate = None if gate is None else split_heads(gate, o.shape[-2])
        return gated_norm(o, gate, self.weight, eps=self.eps or 0.0, activation=activation).flatten(-2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H * D) -> (B, T, H, D)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))


def check_heads(dim: int, num_heads: int, expand: float = 1.0, option: str = "num_heads") -> int:
    """Channels per head, expand * dim / num_heads. Raises ValueError unless that is a whole number >= 1."""
    if num_heads < 1:
        raise ValueError(f"num_heads: seen {num_heads}, wanted at least 1")
    width = expand * dim / num_heads
    if width < 1 or width != int(width):
        raise ValueError(
            f"{option}: {expand:g} * dim / num_heads = {width:g} channels per head for dim = {dim} and num_heads = "
            f"{num_heads}; wanted a whole number"
        )
    return int(width)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis."""
    width = x.shape[-1]
    return gated_norm(x, weight=x.new_full((width,), width**-0.5), eps=eps / width)


def token_shift(x: Tensor, last: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """The previous real token of the same document at every position, and the one to hand to the next call.

    x, shifted (B, T, D); last, new_last (B, D): the token before the first one. A document's first token sees zeros.
    """
    if segments is None:
        # Cut after joining: x[:, :-1] alone would tie an exported program to T > 2.
        return torch.cat([last.unsqueeze(1), x], 1)[:, :-1], x[:, -1].clone()
    channels = x.shape[-1]
    previous = segments.previous().unsqueeze(-1)  # -1: a first token, padding, or the token that continues `last`
    continues = (segments.valid & ~segments.starts).unsqueeze(-1)
    outside = torch.where(continues, last.unsqueeze(1), 0)
    shifted = torch.where(previous >= 0, x.gather(1, previous.clamp(min=0).expand(-1, -1, channels)), outside)
    time = torch.arange(x.shape[1], device=x.device)
    final = torch.where(segments.valid, time, -1).amax(1)[:, None, None]
    new_last = torch.where(final >= 0, x.gather(1, final.clamp(min=0).expand(-1, -1, channels)), last.unsqueeze(1))
    return shifted, new_last.squeeze(1)


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))


def step_log_decay(logits: Tensor, log_a: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(log_a) softplus(logits + dt_bias), float32 at least: the decay over an input-dependent time step."""
    wide = accumulation_dtype(logits.dtype)  # a decay of 0.999 has no room in half precision
    return -log_a.to(wide).exp() * nn.functional.softplus(logits.to(wide) + dt_bias.to(wide))


def retention_log_decay(num_heads: int, like: Tensor) -> Tensor:
    """RetNet's constants (arXiv 2307.08621): log(1 - 2^(-5 - h)) for head h, (H,), at least float32."""
    powers = torch.arange(num_heads, device=like.device, dtype=accumulation_dtype(like.dtype))
    return torch.log1p(-torch.exp(-math.log(2.0) * (5 + powers)))


def log_uniform_steps(*shape: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Bias under a softplus whose value is a time step, log-uniform in [low, high] (Mamba, arXiv 2312.00752)."""
    steps = torch.exp(torch.rand(*shape) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return inverse_softplus(steps)


def feed_forward_width(dim: int, multiple: int = 32) -> int:
    """Hidden width of a SwiGLU with as many weights as a plain 4x layer: 8/3 dim, rounded up."""
    return -(-8 * dim // (3 * multiple)) * multiple


class SwiGLU(nn.Module):
    """y = (silu(x W1) * (x W2)) W3, without biases (Shazeer 2020, arXiv 2002.05202). x, y: (..., D)."""

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or feed_forward_width(dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype, "bias": False}
        self.gate_and_up = nn.Linear(dim, 2 * hidden, **factory)
        self.down = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_and_up(x)))

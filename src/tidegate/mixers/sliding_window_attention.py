"""Softmax attention over the last few tokens: a state of fixed size."""

from __future__ import annotations

import torch

from tidegate.mixers.attention import Attention
from tidegate.registry import register


@register(
    "sliding-window-attention",
    family="attention",
    paper="hybrid-linear-attention",
    title="Longformer: The Long-Document Transformer",
    arxiv="2004.05150",
    tiny=dict(num_heads=4, num_kv_heads=2, window=5),
)
class SlidingWindowAttention(Attention):
    """Attention (see there) in which a token sees itself and the `window` - 1 tokens before it.

    Equation, per head, s over t - window < s <= t of the same document::

        o_t = sum_s softmax_s(q_t . k_s / sqrt(head_dim)) v_s,   y = o W_o

    - `window` counts the token itself (Griffin's and some other codes see one token more for the same number).
    - Keys and values live in a ring of `window` slots; the cost per token does not depend on the length.

    Source: arXiv 2004.05150; as a partner of recurrent layers: Griffin, arXiv 2402.19427. Shapes: x, y (B, T, dim).
    State: keys, values (window, num_kv_heads, head_dim); length, the tokens of the current document.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 128,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window: seen {window}, wanted at least 1 (a token sees itself)")
        super().__init__(
            dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            num_layers=num_layers,
            device=device,
            dtype=dtype,
        )
        self.window = window

"""Mixture of memories: several matrix memories, of which a router lets each token write to and read from a few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.memory_rules import MEMORY_RULES
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import HeadNorm, ShortConvolution, check_heads, split_heads
from tidegate.nn.routing import balance_loss, largest, usage
from tidegate.registry import register
from tidegate.segments import Segments, reorder, zero_padding
from tidegate.state import State


@register(
    "mom",
    family="delta",
    paper="mom",
    title="MoM: Linear Sequence Modeling with Mixture-of-Memories",
    arxiv="2502.13685",
    tiny=dict(num_heads=2, head_dim=8, expand_v=1.5, num_memories=3),
    presets={"380m": dict(num_heads=4), "gla": dict(inner="gla"), "linear": dict(inner="linear")},
)
class MixtureOfMemories(Mixer):
    """Mixture of memories (MoM).

    Equation, per head (R is the inner rule, S^m is K x V, top the k memories with the largest p_t)::

        p_t = softmax(x_t W_r)        w_tm = p_tm / sum_top p_t for m in top, else 0
        S^m_t = R(S^m_{t-1}; k^m_t, v^m_t, gates^m_t) for m in top, else S^m_{t-1}
        o_t = sum_m w_tm (S^m_t)^T q^m_t + (S^shared_t)^T q^shared_t
        y = (RMSNorm_head(o) * silu(x W_g)) W_o

    - q, k, v pass a short convolution with SiLU, which runs along each memory's own sub-sequence: its neighbours are
      the tokens before it that went to the same memory. So q^m differs by memory, although its projection does not.
    - `inner` is R: "gated-deltanet" (the paper's choice), "deltanet", "gla", "hgrn2", "mamba2", "retnet" (without its
      rotation) or "linear"; o must be linear in S, else mixing outputs would not be mixing memories.
    - Every memory has keys, values and gates of its own, `single_kv_proj` shares them; the convolution's weights and
      the constants of the decay are shared anyway. The shared memory takes every token.
    - A memory that a token does not go to does not even fade. Sending the token there is not differentiable; the
      router learns through w, and by `balance_loss`. With `top_k` = 1, w is constantly 1 unless `renormalise=False`.
    - `balance_loss` and `usage` look at the router for given inputs; `tidegate.nn.routing.watch` collects the losses
      of all layers of a model while it runs.

    Initialisation (official code): Linear Xavier-uniform with gain 2^(-2.5).
    Source: arXiv 2502.13685. Shapes: x, y (B, T, dim); K is `head_dim`, or dim / num_heads; V = expand_v K;
    R = num_memories, and one with `shared_memory`.
    State: convolution (R, conv_width - 1, 2 H K + H V), if there is one; memory (R, H, K, V); the shared one is last.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: str = "gated-deltanet",
        num_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        single_kv_proj: bool = False,
        renormalise: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_width: int | None = 4,
        use_output_gate: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.inner, self.num_memories, self.top_k = dim, inner, num_memories, top_k
        self.shared_memory, self.single_kv_proj, self.renormalise = shared_memory, single_kv_proj, renormalise
        self.num_heads, self.head_dim, self.expand_v, self.conv_width = num_heads, head_dim, expand_v, conv_width
        self.use_output_gate, self.norm_eps = use_output_gate, norm_eps
        if inner not in MEMORY_RULES:
            raise ValueError(f"inner: seen {inner!r}, wanted one of {', '.join(MEMORY_RULES)}")
        if not 1 <= top_k <= num_memories:
            raise ValueError(f"top_k: seen {top_k}, wanted 1 to num_memories = {num_memories}")
        self.key_dim = head_dim or check_heads(dim, num_heads)
        self.value_dim = check_heads(self.key_dim, 1, expand_v, "expand_v")
        self.memories = num_memories + shared_memory
        sets = 1 if single_kv_proj else self.memories
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rule = MEMORY_RULES[inner](num_heads, self.key_dim, sets, **factory)
        self.set_widths = (keys, values, self.rule.extra_width)
        self.widths = (keys, *self.set_widths)  # q, k, v, extra
        self.router = nn.Linear(dim, num_memories, bias=False, **factory)
        self.q_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.memory_proj = nn.Linear(dim, sets * sum(self.set_widths), bias=False, **factory)
        width = 2 * keys + values
        self.convolution = (
            ShortConvolution(width, conv_width, activation=self.rule.conv_silu, **factory) if conv_width else None
        )
        self.output_gate = nn.Linear(dim, values, bias=False, **factory) if use_output_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring; the rule, the convolution and the norm as they initialise themselves."""
        for part in (self.rule, self.convolution, self.norm):
            if part is not None:
                part.reset_parameters()
        sets = self.memory_proj.weight.unflatten(0, (-1, sum(self.set_widths)))
        matrices = [self.router.weight, self.q_proj.weight, self.o_proj.weight]
        matrices += [part for own in sets for part in own.split(self.set_widths) if part.numel()]
        if self.output_gate is not None:
            matrices.append(self.output_gate.weight)
        for weight in matrices:
            nn.init.xavier_uniform_(weight, gain=2**-2.5)

    def state_spec(self) -> dict[str, Any]:
        memory = {"memory": (self.memories, self.num_heads, self.key_dim, self.value_dim)}
        if not self.conv_width:
            return memory
        return {"convolution": ((self.memories, self.conv_width - 1, sum(self.widths[:3])), "input"), **memory}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        logits, chosen = self._route(x)
        kept = logits.masked_fill(~chosen, -torch.inf) if self.renormalise else logits
        weight = torch.where(chosen, kept.softmax(-1), 0)
        if self.shared_memory:
            everyone = torch.ones_like(chosen[..., :1])
            chosen, weight = torch.cat([chosen, everyone], -1), torch.cat([weight, everyone.to(weight.dtype)], -1)

        # A memory is a row of the batch, and to it the tokens that go elsewhere are padding.
        keep, emptied = chosen.transpose(1, 2), None
        if segments is None:
            rows = Segments.padded(keep.flatten(0, 1))
        else:
            rows, emptied = segments.routed(keep)
        rows, order, place = rows.compacted()
        memories = self.memory_proj(x).unflatten(-1, (-1, sum(self.set_widths))).transpose(1, 2)
        parts = [self.q_proj(x).unsqueeze(1), memories]
        u = torch.cat([part.expand(-1, self.memories, -1, -1) for part in parts], -1)
        u = reorder(u.flatten(0, 1), order)
        qkv, extra = u.split((sum(self.widths[:3]), self.widths[3]), -1)
        before = state.map(lambda leaf: leaf.flatten(0, 1))
        after: dict[str, Tensor] = {}
        if self.convolution is not None:
            qkv, after["convolution"] = self.convolution(qkv, before["convolution"], rows)
        elif self.rule.always_silu:
            qkv = functional.silu(qkv)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.split(self.widths[:3], -1))
        o, after["memory"] = self.rule(q, k, v, extra, before["memory"], rows)
        if emptied is not None:
            after = {name: torch.where(_like(emptied, leaf), 0, leaf) for name, leaf in after.items()}

        o = reorder(o, place).unflatten(0, (-1, self.memories))
        o = torch.einsum("btm,bmthv->bthv", weight.to(o.dtype), o)
        y = self.norm(o, None if self.output_gate is None else self.output_gate(x))
        new = {name: leaf.unflatten(0, (-1, self.memories)) for name, leaf in after.items()}
        return self.o_proj(y), State(new)

    def balance_loss(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """How unevenly the router spreads these tokens, see `tidegate.nn.routing.balance_loss`; `top_k` at best."""
        logits, chosen = self._route(zero_padding(x, segments))
        return balance_loss(logits.softmax(-1), chosen, segments)

    @torch.no_grad()
    def usage(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """(num_memories,) which share of all routes of these tokens leads to each memory."""
        return usage(self._route(zero_padding(x, segments))[1], segments)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, num_memories) the router's logits, and where the token goes."""
        wide = accumulation_dtype(x.dtype)  # a rounded logit would send a token elsewhere
        logits = functional.linear(x.to(wide), self.router.weight.to(wide))
        return logits, largest(logits, self.top_k)


def _like(rows: Tensor, leaf: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (leaf.ndim - 1))

"""What a token does to a matrix memory: linear recurrences without the layer around them, for layers with several."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import accumulation_dtype
from tidegate.nn.parts import l2_normalise, log_uniform_steps, retention_log_decay, split_heads, step_log_decay
from tidegate.ops import delta_rule, linear_attention
from tidegate.ops.pointwise import log_sigmoid
from tidegate.segments import Segments

Result = tuple[Tensor, Tensor]


class MemoryRule(nn.Module):
    """`o, state = rule(q, k, v, extra, state, segments)`: write k and v into every row's memory, read it with q.

    Shapes: q, k (N, T, H, K); v, o (N, T, H, V); state (N, H, K, V). `extra` (N, T, extra_width) are further channels
    projected from the token, as gates are made of. Where `sets` > 1, each set of projections has gates of its own, and
    row n belongs to set n modulo `sets`. o is linear in the state.
    """

    always_silu = False  # on q, k and v, also where no convolution brings it along
    conv_silu = True  # whether a short convolution on q, k and v is followed by SiLU
    extra_width = 0

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.sets = num_heads, key_dim, sets
        self.scale = key_dim**-0.5

    def reset_parameters(self) -> None:
        """A rule without parameters has nothing to do."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, state: Tensor, segments: Segments | None
    ) -> Result:
        return linear_attention(q, k, v, self.log_decay(extra), scale=self.scale, state=state, segments=segments)

    def log_decay(self, extra: Tensor) -> Tensor | None:
        """As `ops.linear_attention` takes it; None forgets nothing."""
        return None


class Retention(MemoryRule):
    """RetNet's fixed decay per head (arXiv 2307.08621), without its rotation."""

    def log_decay(self, extra: Tensor) -> Tensor:
        return retention_log_decay(self.num_heads, extra)


class KeyGate(MemoryRule):
    """Gated linear attention (arXiv 2312.06635): a gate per key channel, of rank 16 and temperature 16."""

    extra_width = 16
    temperature = 16.0
    no_weight_decay = ("bias",)

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__(num_heads, key_dim, sets)
        self.up = nn.Parameter(torch.empty(sets, self.extra_width, num_heads * key_dim, **factory))
        self.bias = nn.Parameter(torch.empty(sets, num_heads * key_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^(-2.5) in every set, no bias."""
        for weight in self.up:
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.zeros_(self.bias)

    def log_decay(self, extra: Tensor) -> Tensor:
        logits = (extra.unflatten(0, (-1, self.sets)) @ self.up + self.bias[:, None]).flatten(0, 1)
        log_decay = log_sigmoid(logits, logits.new_zeros(logits.shape[-1]), 1 / self.temperature)
        return split_heads(log_decay, self.num_heads)


class StepGate(MemoryRule):
    """A decay per head from an input-dependent time step, as Mamba-2's and Gated DeltaNet's; one for all sets."""

    always_silu = True
    no_weight_decay = ("log_a", "dt_bias")
    lowest = 1e-4  # exp(log_a) starts uniform in [lowest, 16]

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__(num_heads, key_dim, sets)
        self.log_a = nn.Parameter(torch.empty(num_heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """exp(log_a) uniform up to 16, softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
        self.log_a.copy_((self.lowest + (16 - self.lowest) * torch.rand(self.num_heads)).log())
        self.dt_bias.copy_(log_uniform_steps(self.num_heads))


class StateSpace(StepGate):
    """Mamba-2's recurrence (arXiv 2405.21060): the step scales what is written too. Without its direct path d x."""

    lowest = 1.0

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__(num_heads, key_dim, sets, **factory)
        self.extra_width = num_heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, state: Tensor, segments: Segments | None
    ) -> Result:
        wide = accumulation_dtype(extra.dtype)  # a decay of 0.999 has no room in half precision
        step = functional.softplus(extra.to(wide) + self.dt_bias.to(wide))
        log_decay = -self.log_a.to(wide).exp() * step
        v = step[..., None].to(v.dtype) * v
        return linear_attention(q, k, v, log_decay, scale=self.scale, state=state, segments=segments)


class ForgetGateAsKey(MemoryRule):
    """HGRN-2 (arXiv 2404.07904) without lower bound: the key is 1 - lambda, what the forget gate lambda lets go of."""

    conv_silu = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, state: Tensor, segments: Segments | None
    ) -> Result:
        k = k.to(accumulation_dtype(k.dtype))  # 0.999 has no room in half precision
        q, key, log_decay = functional.silu(q), torch.sigmoid(-k).to(q.dtype), functional.logsigmoid(k)
        return linear_attention(q, key, v, log_decay, scale=self.scale, state=state, segments=segments)


class Delta(MemoryRule):
    """DeltaNet (arXiv 2406.06484): unit keys and queries; what stands under a key is moved towards the value."""

    always_silu = True

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__(num_heads, key_dim, sets)
        self.extra_width = num_heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, state: Tensor, segments: Segments | None
    ) -> Result:
        q, k, beta = l2_normalise(q), l2_normalise(k), extra.sigmoid()
        return delta_rule(q, k, v, beta, scale=self.scale, state=state, segments=segments)


class GatedDelta(StepGate):
    """Gated DeltaNet (arXiv 2412.06464): the delta rule on a memory that also fades."""

    def __init__(self, num_heads: int, key_dim: int, sets: int = 1, **factory: Any) -> None:
        super().__init__(num_heads, key_dim, sets, **factory)
        self.extra_width = 2 * num_heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, state: Tensor, segments: Segments | None
    ) -> Result:
        step, beta = extra.chunk(2, -1)
        log_decay = step_log_decay(step, self.log_a, self.dt_bias)
        q, k, beta = l2_normalise(q), l2_normalise(k), beta.sigmoid()
        return delta_rule(q, k, v, beta, log_decay, scale=self.scale, state=state, segments=segments)


MEMORY_RULES: Mapping[str, type[MemoryRule]] = MappingProxyType(
    {
        "linear": MemoryRule,
        "retnet": Retention,
        "gla": KeyGate,
        "mamba2": StateSpace,
        "hgrn2": ForgetGateAsKey,
        "deltanet": Delta,
        "gated-deltanet": GatedDelta,
    }
)

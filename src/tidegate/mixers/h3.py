"""H3: two state space models and two products, so that a recurrence which never changes compares tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.mixers.s4d import S4D
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution, split_heads
from tidegate.ops import short_convolution
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "h3",
    family="scan",
    paper="h3",
    title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
    arxiv="2212.14052",
    tiny=dict(head_dim=2, state_dim=4, shift_dim=5),
    presets={
        "125m": dict(head_dim=8),
        "short-convolution": dict(shift="conv", shift_dim=4),
        "no-shift": dict(shift="none"),
    },
)
class H3(Mixer):
    """Hungry hungry hippos (H3), heads of d = head_dim channels.

    Equation, q, k, v = x W + b::

        k'_t = sum_{s < shift_dim} (sum_j B_j C_{j+s}) k_{t-s} + skip * k_t        per channel
        S_t = S4D(k'_t v_t^T)                                                      per head, one model for d x d numbers
        y_t = (S_t^T q_t) W_o + b_o

    - Linear attention whose decay does not depend on the input: S4D keeps products of keys and values, and the shift
      brings keys of other tokens to a value, as what comes before it.
    - `shift`: "ssm" is a model whose state holds the last `shift_dim` inputs. Whatever its B and C, that is the filter
      above; here its state is those inputs. "conv" learns the filter itself, "none" leaves it out.
    - `state_dim`, `init`, `rule`, `dt_min` and `dt_max` are S4D's.
    - The state, and the work of the recurrence, are d `state_dim` numbers for every channel. The paper's language
      models have d = 8 (preset "125m"), its small tasks d = 1.

    Initialisation: B = (1, 0, 0, ...), C uniform in ±shift_dim^(-1/2), skip ~ N(0, 1), S4D as it is, W as
    torch.nn.Linear, which at dim 768 is the official deviation of 0.02.
    Source: arXiv 2212.14052. Shapes: x, y (B, T, dim).
    State: shift (shift_dim - 1, dim), the last keys; memory (d dim, state_dim / 2), complex.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 1,
        state_dim: int = 64,
        shift: str = "ssm",
        shift_dim: int = 64,
        init: str = "lin",
        rule: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.head_dim, self.state_dim, self.shift, self.shift_dim = dim, head_dim, state_dim, shift, shift_dim
        self.init, self.rule, self.dt_min, self.dt_max = init, rule, dt_min, dt_max
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim: seen {head_dim}, wanted a divisor of dim = {dim}")
        if shift not in ("ssm", "conv", "none"):
            raise ValueError(f"shift: seen {shift!r}, wanted 'ssm', 'conv' or 'none'")
        if shift_dim < 1:
            raise ValueError(f"shift_dim: seen {shift_dim}, wanted at least 1 token")
        self.num_heads = dim // head_dim

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(dim, 3 * dim, **factory)
        self.key_shift: nn.Module | None = None
        if shift == "ssm":
            self.key_shift = ShiftSSM(dim, shift_dim, **factory)
        elif shift == "conv":
            self.key_shift = ShortConvolution(dim, shift_dim, activation=False, **factory)
        system: dict[str, Any] = {
            "state_dim": state_dim,
            "init": init,
            "rule": rule,
            "dt_min": dt_min,
            "dt_max": dt_max,
        }
        self.products = S4D(self.num_heads, output="none", **system, **factory)
        self.o_proj = nn.Linear(dim, dim, **factory)

    def state_spec(self) -> dict[str, Any]:
        states = self.products.state_spec()["memory"][0][1]
        memory = {"memory": ((self.dim * self.head_dim, states), "complex")}
        if self.key_shift is None:
            return memory
        return {"shift": ((self.shift_dim - 1, self.dim), "input"), **memory}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self.qkv_proj(x).chunk(3, -1), {}
        if self.key_shift is not None:
            k, new["shift"] = self.key_shift(k, state["shift"], segments)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))  # (B, T, H, d)
        products = (k[..., None] * v[..., None, :]).flatten(2)  # (B, T, H d d)
        copies = self.head_dim**2
        decay, weight, skip = (part.repeat_interleave(copies, 0) for part in self.products.system())
        s, new["memory"] = diagonal_ssm(products, decay, weight, state=state["memory"], segments=segments)
        s = torch.addcmul(s, skip, products)
        o = (q[..., None] * s.unflatten(-1, (self.num_heads, self.head_dim, self.head_dim))).sum(-2).flatten(2)
        return zero_padding(self.o_proj(o), segments), State(new)


class ShiftSSM(nn.Module):
    """A state space model per channel whose state is a shift register: `y, tail = shift(x, tail, segments)`.

    Equation, s_t of N numbers::

        s_t = (0, s_{t-1}[0], ..., s_{t-1}[N - 2]) + B x_t          y_t = C s_t + skip * x_t

    Everything leaves the register after N tokens, so this is a filter of N taps. x, y (B, T, D), tail (B, N - 1, D).
    """

    no_weight_decay = ("input_weight",)

    def __init__(
        self, dim: int, states: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(dim, states, device=device, dtype=dtype))  # B
        self.output_weight = nn.Parameter(torch.empty(dim, states, device=device, dtype=dtype))  # C
        self.skip = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """B the first unit vector, C as torch.nn.Conv1d's weights, skip ~ N(0, 1)."""
        self.input_weight.zero_()
        self.input_weight[:, 0] = 1
        bound = self.output_weight.shape[1] ** -0.5
        nn.init.uniform_(self.output_weight, -bound, bound)
        nn.init.normal_(self.skip)

    def taps(self) -> Tensor:
        """The filter (D, N), the current token's weight first: sum_j B_j C_{j+s}, and the skip."""
        wide = accumulation_dtype(self.skip.dtype)
        states = self.input_weight.shape[1]
        B, C = (torch.fft.rfft(w.to(wide), n=2 * states) for w in (self.input_weight, self.output_weight))
        correlation = torch.fft.irfft(B.conj() * C, n=2 * states)[:, :states]
        return torch.cat([correlation[:, :1] + self.skip[:, None], correlation[:, 1:]], 1)

    def forward(self, x: Tensor, tail: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        return short_convolution(x, self.taps().flip(1), state=tail, segments=segments)

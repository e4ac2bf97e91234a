"""What diagonal state space models share: the step from continuous time to tokens, and what comes after a channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.hippo import nplr
from tidegate.nn.mixer import accumulation_dtype
from tidegate.ops.diagonal_ssm.parallel import decay_powers

INITS = ("legs", "lin", "inv", "real", "quad", "rand")
OUTPUTS = ("glu", "linear", "none")
RULES = ("zoh", "bilinear", "trapezoid", "dirac")


def discretise(real: Tensor, imaginary: Tensor, step: Tensor, rule: str = "zoh") -> tuple[Tensor, Tensor]:
    """From h' = l h + u with l = real + i imaginary to h_t = decay h_{t-1} + scale u_t; both complex.

    Equation, z = step l::

        zoh:       decay = exp(z),                   scale = (exp(z) - 1) / l
        bilinear:  decay = (1 + z/2) / (1 - z/2),    scale = step / (1 - z/2)
        trapezoid: decay = exp(z),                   scale = step,     and u_t counts half while it is new
        dirac:     decay = exp(z),                   scale = 1

    `real`, `imaginary` and `step` broadcast. "zoh" holds u over a step, "dirac" takes it as an impulse. Exact for short
    steps, where exp(z) - 1 as it stands would be the difference of two numbers that are nearly the same.

    "trapezoid" is h_t = decay h_{t-1} + step/2 (decay u_{t-1} + u_t). Run with scale = step and read h_t - step/2 u_t:
    that is the same, and no earlier u has to be remembered.

    Raises ValueError for another rule. Source: HTTYH, arXiv 2206.12037; S4D, 2206.11893; trapezoid Mamba-3, 2603.15569.

    >>> decay, scale = discretise(torch.tensor(-1.0), torch.tensor(0.0), torch.tensor(0.5))
    >>> round(decay.real.item(), 4), round(scale.real.item(), 4)
    (0.6065, 0.3935)
    """
    if rule not in RULES:
        raise ValueError(f"rule: seen {rule!r}, wanted one of {', '.join(RULES)}")
    a, b = torch.broadcast_tensors(step * real, step * imaginary)
    if rule == "bilinear":
        inverse = 1 / torch.complex(1 - a / 2, -b / 2)
        return torch.complex(1 + a / 2, b / 2) * inverse, step * inverse
    modulus = torch.exp(a)
    decay = torch.complex(modulus * torch.cos(b), modulus * torch.sin(b))
    if rule in ("dirac", "trapezoid"):
        return decay, torch.ones_like(decay) * (step if rule == "trapezoid" else 1)
    minus_one = torch.complex(torch.expm1(a) * torch.cos(b) - 2 * torch.sin(b / 2).square(), modulus * torch.sin(b))
    tiny = a * a + b * b < 1e-12
    quotient = minus_one / torch.complex(torch.where(tiny, 1, a), torch.where(tiny, 0, b))
    return decay, step * torch.where(tiny, torch.complex(1 + a / 2, b / 2), quotient)


def kernel(decay: Tensor, weight: Tensor, size: int) -> Tensor:
    """Re sum_n weight_n decay_n^s for s = 0 ... size - 1: the filter that a diagonal model is; (D, N) -> (D, size).

    As products of matrices, decay^(i + block j) = decay^i decay^(block j): of powers, only about 2 sqrt(size) for each
    state are ever there.

    >>> half, one = torch.full((1, 1), 0.5 + 0j), torch.ones(1, 1, dtype=torch.complex64)
    >>> kernel(half, one, 3).tolist()
    [[1.0, 0.5, 0.25]]
    """
    block = 1 << ((int(size) - 1).bit_length() + 1) // 2
    inner = decay_powers(decay, block)  # (D, N, block)
    outer = weight[..., None] * decay_powers(inner[..., -1] * decay, -(-int(size) // block))
    real = torch.cat([outer.real, -outer.imag], dim=1).mT @ torch.cat([inner.real, inner.imag], dim=1)
    return real.flatten(1)[:, :size]


def complex_weight(x: Tensor) -> Tensor:
    """A complex tensor of a parameter (..., 2), its real and imaginary part, or (..., 1), its real part."""
    return torch.view_as_complex(x) if x.shape[-1] == 2 else torch.complex(x[..., 0], torch.zeros_like(x[..., 0]))


class DiagonalSystem(nn.Module):
    """The parameters of `dim` diagonal state space models in continuous time, as S4D has them.

    Equation, with N / 2 eigenvalues l, one of each conjugate pair::

        h' = l h + B x,       z = 2 Re(C h)            l = -exp(log_real) + i imag,  at steps of exp(log_step)

    - `init` of l, n = 0 ... N/2 - 1: "lin" -1/2 + i pi n; "inv" -1/2 + i N/pi (N / (2n + 1) - 1); "legs" HiPPO's
      normal part, with its B; "quad" (1 + 2n)^2 / pi and "rand" exp(N(0, 1)) as imaginary parts. "real" is a model with
      N real eigenvalues -(n + 1), without the factor 2. B = 1 but for "legs".
    - Only B * C matters; `freeze_input` leaves B untrained. `num_systems` < dim shares l and B among channels.
    - `step_per_state` learns a step for every state instead of every channel.

    Whoever owns it calls `reset_parameters`: C ~ N(0, 1) (complex), steps log-uniform in [dt_min, dt_max].
    Source: S4D, arXiv 2206.11893.
    """

    input_weight: Tensor
    no_weight_decay: tuple[str, ...] = ("log_real", "imag", "input_weight", "log_step")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        init: str = "lin",
        rule: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_per_state: bool = False,
        num_systems: int | None = None,
        freeze_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.init, self.rule = dim, state_dim, init, rule
        self.dt_min, self.dt_max, self.step_per_state = dt_min, dt_max, step_per_state
        self.num_systems, self.freeze_input = num_systems, freeze_input
        if init not in INITS:
            raise ValueError(f"init: seen {init!r}, wanted one of {', '.join(INITS)}")
        if state_dim < 1 or (init != "real" and state_dim % 2):
            raise ValueError(f"state_dim: seen {state_dim}, wanted an even number, for conjugate pairs")
        if rule not in RULES:
            raise ValueError(f"rule: seen {rule!r}, wanted one of {', '.join(RULES)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
        systems = dim if num_systems is None else num_systems
        if systems < 1 or dim % systems:
            raise ValueError(f"num_systems: seen {num_systems}, wanted a divisor of dim = {dim}")
        parts = 1 if init == "real" else 2
        states = state_dim // parts

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_real = nn.Parameter(torch.empty(systems, states, **factory))
        self.imag = None if init == "real" else nn.Parameter(torch.empty(systems, states, **factory))
        input_weight = torch.empty(systems, states, parts, **factory)
        if freeze_input:
            self.register_buffer("input_weight", input_weight)
        else:
            self.input_weight = nn.Parameter(input_weight)
        self.output_weight = nn.Parameter(torch.empty(dim, states, parts, **factory))
        self.log_step = nn.Parameter(torch.empty(*((dim, states) if step_per_state else (dim,)), **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        N, n = self.state_dim, torch.arange(self.log_real.shape[1], dtype=torch.float64)
        nn.init.constant_(self.log_real, math.log(0.5))
        B = torch.ones(len(n), dtype=torch.complex128)
        if self.imag is None:
            self.log_real.copy_(torch.log(n + 1).expand_as(self.log_real))
        elif self.init == "legs":
            eigenvalues, _, B, _ = nplr("legs", N)
            B = B[: len(n)]
            B.imag.clamp_(-2, 2)  # as in the official code
            self.imag.copy_(eigenvalues.imag[: len(n)].expand_as(self.imag))
        else:
            rules = {"lin": math.pi * n, "inv": N / math.pi * (N / (2 * n + 1) - 1), "quad": (1 + 2 * n) ** 2 / math.pi}
            random = self.init == "rand"
            self.imag.copy_(torch.randn(self.imag.shape).exp() if random else rules[self.init].expand_as(self.imag))
        self.input_weight.copy_(torch.view_as_real(B)[:, : self.input_weight.shape[-1]].expand_as(self.input_weight))
        nn.init.normal_(self.output_weight, std=self.output_weight.shape[-1] ** -0.5)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))

    def discretised(self, rescale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """decay, B and C (dim, states), complex, of h_t = decay * h_{t-1} + B x_t and z_t = Re sum C * h_t.

        `rescale` multiplies the steps, for input sampled at another rate than in training.
        """
        wide = accumulation_dtype(self.log_real.dtype)
        real = -torch.exp(self.log_real.to(wide))
        imag = torch.zeros_like(real) if self.imag is None else self.imag.to(wide)
        copies = self.dim // real.shape[0]
        step = rescale * torch.exp(self.log_step.to(wide)).view(self.dim, -1)
        decay, scale = discretise(real.repeat(copies, 1), imag.repeat(copies, 1), step, self.rule)
        B, C = complex_weight(self.input_weight.to(wide)), complex_weight(self.output_weight.to(wide))
        return decay, scale * B.repeat(copies, 1), self.output_weight.shape[-1] * C

    def frequencies(self) -> Tensor:
        """How many turns each state makes per step, without any rescaling; (dim, states), at least 0."""
        step = torch.exp(self.log_step.to(accumulation_dtype(self.log_step.dtype))).view(self.dim, -1)
        imag = torch.zeros_like(self.log_real) if self.imag is None else self.imag
        return step * imag.abs().to(step.dtype).repeat(self.dim // imag.shape[0], 1) / (2 * math.pi)


class ChannelMap(nn.Module):
    """What follows a model per channel: GELU, then y = (z W_1) * sigmoid(z W_2) for "glu", or y = z W for "linear".

    "none" gives the models' outputs as they are. Each channel may have several `outputs`, side by side in z: z (B, T,
    D M), y (B, T, D).
    """

    def __init__(
        self,
        dim: int,
        output: str,
        *,
        outputs: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output: seen {output!r}, wanted one of {', '.join(OUTPUTS)}")
        if outputs < 1 or (outputs > 1 and output == "none"):
            wanted = "1, for output='none' mixes nothing" if output == "none" else "at least 1"
            raise ValueError(f"channels: seen {outputs} outputs per channel, wanted {wanted}")
        self.output = output
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim * (2 if output == "glu" else 1)
        self.proj = None if output == "none" else nn.Linear(dim * outputs, width, **factory)

    def reset_parameters(self) -> None:
        """As torch.nn.Linear: uniform in ±D^(-1/2)."""
        if self.proj is not None:
            self.proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is None:
            return x
        y = self.proj(functional.gelu(x))
        return functional.glu(y, -1) if self.output == "glu" else y

"""DSS: diagonal state spaces with eigenvalues shared by all channels, normalised over a length or decaying."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.hippo import nplr
from tidegate.nn.mixer import Mixer
from tidegate.nn.state_space import ChannelMap, discretise
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

FORMS = ("softmax", "exp", "exp-no-scale")


@register(
    "dss",
    family="scan",
    paper="dss-s4d",
    title="Diagonal State Spaces are as Effective as Structured State Spaces",
    arxiv="2203.14343",
    tiny=dict(state_dim=6, length=64),
    presets={"exp": dict(form="exp"), "exp-no-scale": dict(form="exp-no-scale")},
)
class DSS(Mixer):
    """Diagonal state spaces (DSS), N eigenvalues l for all channels.

    Equation, z = step l of a channel, as the kernel that the channel is convolved with::

        softmax:        K_s = Re sum_n w_n / l_n * e^(s z_n) / (1 + e^(z_n) + ... + e^((L-1) z_n))       L = `length`
        exp:            K_s = Re sum_n w_n / l_n * (e^(z_n) - 1) * e^(s z_n)
        exp-no-scale:   K_s = Re sum_n w_n * e^(s z_n)
        y = gelu(K * x + skip * x) W

    - All N states are kept, without conjugate pairs and without a factor of two. With the defaults that is more
      arithmetic per token (64 complex products and sums per channel) than in the layer's only matrix.
    - "softmax" depends on the length it is normalised over. The official code takes that of the batch at hand, so that
      two lengths are two models; here it is the option `length`, and a shorter or longer sequence is the same model.
    - The real parts of l are -exp(log_real) in the forms "exp". In "softmax" they are free, but held below -1e-4: the
      growing modes that a fixed length could bear would not survive a stream.
    - `separate_steps`: real and imaginary part of l have a step each, as in the official code.
    - `init`: "skew-hippo" are the N eigenvalues of HiPPO-LegS of size 2 N whose imaginary part is positive; "random"
      draws both parts.
    - `output="glu"` is a gated W, "none" leaves GELU and W out.

    Initialisation: w ~ N(0, 1) per part, skip ~ N(0, 1), steps log-uniform in [dt_min, dt_max], W as torch.nn.Linear.
    Source: arXiv 2203.14343 and its code. Shapes: x, y (B, T, dim).
    State: memory (dim, N), complex: sum_s e^(s z) x_{t-s}.
    """

    no_weight_decay = ("real", "imag", "log_step", "output_weight")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        form: str = "softmax",
        length: int = 1024,
        init: str = "skew-hippo",
        separate_steps: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.form, self.length, self.init = dim, state_dim, form, length, init
        self.separate_steps, self.dt_min, self.dt_max, self.output = separate_steps, dt_min, dt_max, output
        if state_dim < 1:
            raise ValueError(f"state_dim: seen {state_dim}, wanted at least 1")
        if form not in FORMS:
            raise ValueError(f"form: seen {form!r}, wanted one of {', '.join(FORMS)}")
        if length < 1:
            raise ValueError(f"length: seen {length}, wanted at least 1 token")
        if init not in ("skew-hippo", "random"):
            raise ValueError(f"init: seen {init!r}, wanted 'skew-hippo' or 'random'")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.real = nn.Parameter(torch.empty(state_dim, **factory))  # its logarithm in the forms "exp", negated
        self.imag = nn.Parameter(torch.empty(state_dim, **factory))
        self.log_step = nn.Parameter(torch.empty(dim, 2 if separate_steps else 1, **factory))
        self.output_weight = nn.Parameter(torch.empty(dim, state_dim, 2, **factory))  # w
        self.skip = nn.Parameter(torch.empty(dim, **factory))
        self.output_map = ChannelMap(dim, output, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        if self.init == "skew-hippo":
            nn.init.constant_(self.real, -0.5 if self.form == "softmax" else math.log(0.5))
            self.imag.copy_(nplr("legs", 2 * self.state_dim)[0].imag[self.state_dim :])
        else:
            nn.init.normal_(self.real)
            nn.init.normal_(self.imag)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.output_weight)
        nn.init.normal_(self.skip)
        self.output_map.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((self.dim, self.state_dim), "complex")}

    def system(self) -> tuple[Tensor, Tensor]:
        """decay and weight (dim, N), complex128: K_s = Re sum weight * decay^s."""
        # e^(L z) has turned by hundreds of radians, of which float32 would keep but four digits after the point.
        real, imag = self.real.double(), self.imag.double()
        real = real.clamp(max=-1e-4) if self.form == "softmax" else -torch.exp(real)
        step = torch.exp(self.log_step.double())
        a, b = step[:, :1] * real, step[:, -1:] * imag  # z
        one = torch.ones_like(step[:, :1])
        decay, per_step = discretise(a, b, one)  # (e^z - 1) / z
        w = torch.view_as_complex(self.output_weight.double())
        if self.form == "exp-no-scale":
            return decay, w
        weight = w / torch.complex(real, imag) * per_step
        if self.form == "exp":
            weight = weight * torch.complex(a, b)
        else:
            # (e^z - 1) / (e^(L z) - 1) by the quotient (e^(L z) - 1) / (L z), which is fine for short steps. It may
            # vanish at other z: the reciprocal has the official code's 1e-7 beside |e^(L z) - 1|^2.
            _, total = discretise(self.length * a, self.length * b, one)
            guard = 1e-7 / (self.length**2 * (a * a + b * b)).clamp(min=1)
            weight = weight * total.conj() / (self.length * (total.real.square() + total.imag.square() + guard))
        return decay, weight

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        z, memory = diagonal_ssm(x, *self.system(), state=state["memory"], segments=segments)
        y = self.output_map(torch.addcmul(z, self.skip, x))
        return zero_padding(y, segments), State(memory=memory)

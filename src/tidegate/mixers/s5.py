"""S5: one diagonal state space model that reads all channels and writes all channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.hippo import nplr
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.state_space import discretise
from tidegate.ops import scan
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


@register(
    "s5",
    family="scan",
    paper="s5",
    title="Simplified State Space Layers for Sequence Modeling",
    arxiv="2208.04933",
    tiny=dict(state_dim=24, blocks=2),
    presets={
        "lra-image": dict(state_dim=384, blocks=3, c_init="lecun_normal", clip_eigenvalues=True),
        "path-x": dict(state_dim=256, blocks=16, c_init="complex_normal", dt_min=1e-4),
    },
)
class S5(Mixer):
    """Simplified state space layer (S5), the layer itself.

    Equation, continuous and then at steps of exp(log_step), P eigenvalues l in conjugate pairs, of which one is kept::

        h' = l h + B x                    y = 2 Re(C h) + skip * x
        h_t = exp(step l) * h_{t-1} + (exp(step l) - 1) / l * (B x_t)                        rule "zoh"

    - `rule="bilinear"` is the other discretisation. The factor 2 belongs to `conjugate_symmetry`; without it all P
      states are kept and y = Re(C h).
    - Steps are learnt, one per state; `step_rescale` multiplies them, for input sampled at another rate. `gaps` (B, T)
      in a call multiplies each token's step, for input at irregular times.
    - The real parts of l are free; `clip_eigenvalues` holds them below -1e-4, without which long runs may diverge.
    - The paper's block around it is a norm, and a GELU with gate behind; here that is the model's part.

    `input_weight` (P/2, 2, dim) holds (Re B, Im B), `output_weight` (dim, P/2, 2) holds (Re C, -Im C).

    Initialisation: l from HiPPO-LegS of size P / blocks, `blocks` times; real B of variance 1 / P and C by `c_init`,
    both turned into l's basis V: "trunc_standard_normal" has variance 1 / P per part, "lecun_normal" 1 / (P dim),
    "complex_normal" 1/2, and no V. Steps log-uniform in [dt_min, dt_max], skip ~ N(0, 1).
    Source: arXiv 2208.04933 and its code. Shapes: x, y (B, T, dim), P = state_dim or dim.
    State: memory (P / 2), or (P) without `conjugate_symmetry`, complex.
    """

    no_weight_decay = ("eigenvalue_real", "eigenvalue_imag", "log_step", "input_weight")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int | None = None,
        blocks: int = 1,
        conjugate_symmetry: bool = True,
        rule: str = "zoh",
        c_init: str = "trunc_standard_normal",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_rescale: float = 1.0,
        clip_eigenvalues: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.blocks, self.conjugate_symmetry = dim, state_dim, blocks, conjugate_symmetry
        self.rule, self.c_init, self.dt_min, self.dt_max = rule, c_init, dt_min, dt_max
        self.step_rescale, self.clip_eigenvalues = step_rescale, clip_eigenvalues
        self.full = dim if state_dim is None else state_dim
        unit = blocks * (2 if conjugate_symmetry else 1)
        if blocks < 1 or self.full < 1 or self.full % unit:
            raise ValueError(f"state_dim: {self.full} states in {blocks} blocks, wanted a multiple of {unit}")
        if rule not in ("zoh", "bilinear"):
            raise ValueError(f"rule: seen {rule!r}, wanted 'zoh' or 'bilinear'")
        if c_init not in C_INITS:
            raise ValueError(f"c_init: seen {c_init!r}, wanted one of {', '.join(C_INITS)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
        if not step_rescale > 0:
            raise ValueError(f"step_rescale: seen {step_rescale}, wanted more than 0")
        states = self.full // 2 if conjugate_symmetry else self.full

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.eigenvalue_real = nn.Parameter(torch.empty(states, **factory))
        self.eigenvalue_imag = nn.Parameter(torch.empty(states, **factory))
        self.log_step = nn.Parameter(torch.empty(states, **factory))
        self.input_weight = nn.Parameter(torch.empty(states, 2, dim, **factory))
        self.output_weight = nn.Parameter(torch.empty(dim, states, 2, **factory))
        self.skip = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        size = self.full // self.blocks
        eigenvalues, _, _, vectors = nplr("legs", size)
        kept = size // 2 if self.conjugate_symmetry else size
        w, basis = eigenvalues.imag[:kept].repeat(self.blocks), torch.block_diag(*[vectors[:, :kept]] * self.blocks)
        nn.init.constant_(self.eigenvalue_real, -0.5)
        self.eigenvalue_imag.copy_(w)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))
        B = basis.mH @ _truncated_normal(self.full, self.dim, std=self.full**-0.5).to(basis)
        self.input_weight.copy_(torch.view_as_real(B).movedim(-1, 1))
        if self.c_init == "complex_normal":
            C = torch.randn(self.dim, len(w), dtype=basis.dtype)  # the two parts share the variance of one
        else:
            spread = self.full if self.c_init == "trunc_standard_normal" else self.full * self.dim
            C = torch.complex(*_truncated_normal(2, self.dim, self.full, std=spread**-0.5).double()) @ basis
        self.output_weight.copy_(torch.view_as_real(C.conj().resolve_conj()))
        nn.init.normal_(self.skip)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((len(self.log_step),), "complex")}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        wide = accumulation_dtype(x.dtype)
        real, imaginary = self.eigenvalue_real.to(wide), self.eigenvalue_imag.to(wide)
        if self.clip_eigenvalues:
            real = real.clamp(max=-1e-4)
        step = self.step_rescale * torch.exp(self.log_step.to(wide))
        if gaps is not None:
            if gaps.shape != x.shape[:2]:
                raise ValueError(f"gaps: seen shape {tuple(gaps.shape)}, wanted (batch, time) = {tuple(x.shape[:2])}")
            step = gaps.to(wide)[..., None] * step
        decay, scale = discretise(real, imaginary, step, self.rule)
        weight = self.input_weight.flatten(0, 1)
        inputs = torch.view_as_complex(functional.linear(x, weight).to(wide).unflatten(-1, (-1, 2)))
        h, memory = scan(decay, scale * inputs, state=state["memory"], segments=segments)
        read = (2 if self.conjugate_symmetry else 1) * self.output_weight.flatten(1)
        y = functional.linear(torch.view_as_real(h).flatten(-2).to(x.dtype), read)
        return torch.addcmul(y, self.skip, x), State(memory=memory)


def _truncated_normal(*shape: int, std: float) -> Tensor:
    """Normal within two standard deviations, then of the standard deviation `std`, as JAX draws it."""
    return nn.init.trunc_normal_(torch.empty(*shape), std=1.0, a=-2.0, b=2.0) * (std / 0.8796256610342398)

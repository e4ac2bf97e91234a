"""S4: a state space model for every channel whose matrix is diagonal plus low rank, as HiPPO's are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.hippo import nplr
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.state_space import ChannelMap, complex_weight
from tidegate.ops import long_convolution
from tidegate.ops.dense_ssm import dense_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

INITS = ("legs", "legt", "fout", "hippo", "dplr")
_BLOCK = 256  # frequencies at a time


@register(
    "s4",
    family="scan",
    paper="s4",
    title="Efficiently Modeling Long Sequences with Structured State Spaces",
    arxiv="2111.00396",
    tiny=dict(state_dim=8),
    presets={
        **{name: dict(init=name) for name in ("legt", "fout")},
        "hippo": dict(init="hippo", num_systems=2),
        "lra-pathfinder": dict(num_systems=None),
        "path-x": dict(num_systems=None, dt_min=1e-4),
    },
)
class S4(Mixer):
    """Structured state space model (S4).

    Equation, per channel, of N / 2 complex numbers h, one of each conjugate pair; then at steps d = exp(log_step)::

        h' = A h + B x,      z = 2 Re(C h) + skip * x,      y = glu(gelu(z) W)
        A h = l * h - P (2 Re(P^* h)),                       l = -exp(log_real) + i imag
        h_t = (1 - d/2 A)^-1 ((1 + d/2 A) h_{t-1} + d B x_t)                           the bilinear rule

    - P P^* on both sides, with the same P, lets no state grow, whatever is learnt: |h| is a norm that A shrinks.
    - `init`: "legs" (HiPPO's, never ending), "legt" and "fout" (the last 2 / d tokens; Legendre polynomials and
      waves), "hippo" (half the systems "legs", half "fout"), "dplr" (S4D's -1/2 + i pi n, random P).
    - `rank` of P: 1, for "legt" 2. A larger one adds columns of 0.01 N(0, 1), as zeros would never learn.
    - `num_systems` l, P and B are shared among the channels; None: each has its own.
    - `channels` is the number of outputs z of every model, all of which W reads.
    - `step_rescale` multiplies the steps, for input sampled at another rate than in training.
    - C stands for itself. The official code keeps C (1 - A^L) for a length L, which changes with it.
    - `kernel(T)` are the first taps by the paper's algorithm, a Cauchy sum for every frequency; `convolve(x)` is the
      model without a state, through it.

    A whole sequence is computed in pieces of 64 tokens, with products by powers of an N x N matrix (`ops.dense_ssm`).
    Measured at dim 256, N 64 and T 2048 on one core, a token takes 0.8 of the time of a "gla" layer's at batch 16, and
    1.7 times as long at batch 1, where making the powers is most of it. `convolve` takes 2 and 11 times as long as
    `forward`, nearly all of it for the kernel, in float64.

    Initialisation (official code): l, P, B from HiPPO, Im B within 2; C ~ N(0, 1) (complex), skip ~ N(0, 1), steps
    log-uniform in [dt_min, dt_max], W as torch.nn.Linear.
    Source: arXiv 2111.00396, and 2202.09729 for P P^*. Shapes: x, y (B, T, dim).
    State: memory (dim, N): the real parts of h, then the imaginary ones.
    """

    no_weight_decay = ("log_real", "imag", "low_rank", "input_weight", "log_step")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        init: str = "legs",
        rank: int | None = None,
        num_systems: int | None = 1,
        channels: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_rescale: float = 1.0,
        output: str = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.init, self.rank = dim, state_dim, init, rank
        self.num_systems, self.channels, self.output = num_systems, channels, output
        self.dt_min, self.dt_max, self.step_rescale = dt_min, dt_max, step_rescale
        if init not in INITS:
            raise ValueError(f"init: seen {init!r}, wanted one of {', '.join(INITS)}")
        if state_dim < 2 or state_dim % 2:
            raise ValueError(f"state_dim: seen {state_dim}, wanted an even number, for conjugate pairs")
        least = 2 if init == "legt" else 1
        if rank is not None and rank < least:
            raise ValueError(f"rank: seen {rank}, but init={init!r} needs {least}")
        systems = dim if num_systems is None else num_systems
        if systems < 1 or dim % systems:
            raise ValueError(f"num_systems: seen {num_systems}, wanted a divisor of dim = {dim}")
        if init == "hippo" and systems % 2:
            raise ValueError(
                f"num_systems: seen {num_systems}, wanted an even number for two halves, as init='hippo' has"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
        if not step_rescale > 0:
            raise ValueError(f"step_rescale: seen {step_rescale}, wanted more than 0")
        pairs = state_dim // 2

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_real = nn.Parameter(torch.empty(systems, pairs, **factory))
        self.imag = nn.Parameter(torch.empty(systems, pairs, **factory))
        self.low_rank = nn.Parameter(torch.empty(systems, rank or least, pairs, 2, **factory))  # P
        self.input_weight = nn.Parameter(torch.empty(systems, pairs, 2, **factory))
        self.output_weight = nn.Parameter(torch.empty(dim, channels, pairs, 2, **factory))
        self.log_step = nn.Parameter(torch.empty(dim, **factory))
        self.skip = nn.Parameter(torch.empty(dim, channels, **factory))
        self.output_map = ChannelMap(dim, output, outputs=channels, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        systems, rank, pairs, _ = self.low_rank.shape
        halves = {"hippo": ("legs", "fout")}.get(self.init, (self.init,))
        for half, measure in enumerate(halves):
            own = slice(half * systems // len(halves), (half + 1) * systems // len(halves))
            if measure == "dplr":
                eigenvalues = torch.complex(torch.full((pairs,), -0.5), math.pi * torch.arange(pairs).float())
                P, B = torch.randn(rank, pairs, dtype=torch.complex128), torch.ones(pairs, dtype=torch.complex128)
            else:
                eigenvalues, P, B, _ = nplr(measure, self.state_dim)
                eigenvalues, P, B = eigenvalues[:pairs], P[:pairs].T, B[:pairs]
                P = torch.cat([P, 0.01 * torch.randn(rank - len(P), pairs, dtype=P.dtype)])
            self.log_real[own] = torch.log(-eigenvalues.real.clamp(max=-1e-4)).to(self.log_real)
            self.imag[own] = eigenvalues.imag.to(self.imag)
            self.low_rank[own] = torch.view_as_real(P.contiguous()).to(self.low_rank)
            B = torch.complex(B.real, B.imag.clamp(-2, 2))  # as in the official code
            self.input_weight[own] = torch.view_as_real(B).to(self.input_weight)
        nn.init.normal_(self.output_weight, std=0.5**0.5)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.skip)
        self.output_map.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.dim, self.state_dim)}

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """l (dim, N/2), P (dim, R, N/2), B (dim, N/2), C (dim, channels, N/2), complex128, and the steps (dim, 1)."""
        eigenvalues = torch.complex(-torch.exp(self.log_real.double()), self.imag.double())
        P, B = complex_weight(self.low_rank.double()), complex_weight(self.input_weight.double())
        copies = self.dim // len(eigenvalues)
        step = self.step_rescale * torch.exp(self.log_step.double())[:, None]
        C = complex_weight(self.output_weight.double())
        return eigenvalues.repeat(copies, 1), P.repeat(copies, 1, 1), B.repeat(copies, 1), C, step

    def discretised(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """The real system of the N real and imaginary parts: h_t = a h_{t-1} + b x_t, z_t = c h_t.

        a (dim, N, N), b (dim, N), c (dim, channels, N). Vectors are computed in float64, the matrices of their products
        in `dtype`.
        """
        eigenvalues, P, B, C, step = self.continuous()
        # (1 - d/2 A)^-1 = D - D P d (1 + d Re(P^* D P))^-1 Re(P^* D .), D = (1 - d/2 l)^-1, and a is twice that less 1.
        D = 1 / (1 - step / 2 * eigenvalues)
        left, right = D[:, None] * P, D[:, None] * P.conj()
        small = torch.einsum("drn,dsn->drs", right, P).real * step[..., None]
        small = small + torch.eye(P.shape[1], dtype=small.dtype, device=small.device)
        seen = step[..., None] * torch.linalg.solve(small, torch.cat([right.real, -right.imag], -1))  # (dim, R, N)
        b = step * (D * B - torch.einsum("drn,dr->dn", left, (seen * _parts(B)[:, None]).sum(-1).to(left)))
        real, imag = (torch.diag_embed(x.to(dtype)) for x in (2 * D.real - 1, 2 * D.imag))
        a = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)
        a = torch.baddbmm(a, _parts(left).mT.to(dtype), seen.to(dtype), alpha=-2)
        return a, _parts(b).to(dtype), _parts(2 * C.conj()).to(dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        a, b, c = self.discretised(accumulation_dtype(x.dtype))
        z, memory = dense_ssm(x, a, b, c, state=state["memory"], segments=segments)
        y = self.output_map(torch.addcmul(z, self.skip, x[..., None]).flatten(2))
        return zero_padding(y, segments), State(memory=memory)

    # -- the convolution that it is ------------------------------------------------------------------------------------
    def kernel(self, length: int) -> Tensor:
        """c a^s b for s = 0 ... length - 1, (dim, channels, length), float64: O(N + length) numbers, no powers of a.

        Equation, w the roots of unity and C~ = C (1 - a^length), what makes a sum without end one over the length::

            k(X, Y) = sum_n X_n Y_n / (2 (1 - w) - (1 + w) d l_n)     over all N states
            irfft(2 d (k(C~, B) - g k(C~, P) (1 + g k(P^*, P))^-1 k(P^*, B))),     g = d (1 + w)

        In this form of the paper's there is no division by 1 + w, which is 0 at the highest frequency.
        """
        eigenvalues, P, B, _, step = self.continuous()
        a, _, c = self.discretised()
        c = c - c @ torch.linalg.matrix_power(a, length)
        C = torch.complex(c[..., : len(B.T)], -c[..., len(B.T) :]) / 2
        # k of every C~ and P^* with B and every P at once. X Y / (z - l) of a pair is (p z - q) / ((z - l) (z - l^*)),
        # p and q real.
        pairs = 2 * torch.cat([C, P.conj()], 1)[:, :, None] * torch.cat([B[:, None], P], 1)[:, None]
        weights = torch.stack([pairs.real, step[:, None, None] * (pairs * eigenvalues.conj()[:, None, None]).real], 1)
        angle = -2 * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64, device=step.device)
        poles, spectrum = (step * eigenvalues)[..., None], []
        for w in torch.polar(torch.ones_like(angle), angle).split(_BLOCK):
            z, g = 2 * (1 - w), (step * (1 + w))[:, None, None]
            terms = 1 / ((z - (1 + w) * poles) * (z - (1 + w) * poles.conj()))
            sums = weights.flatten(1, 3) @ torch.view_as_real(terms).flatten(2)
            p, q = torch.view_as_complex(sums.view(*weights.shape[:4], -1, 2)).unbind(1)
            k = p * z - q * (1 + w)
            for _ in range(P.shape[1]):  # one column of P after the other: 1 + g k(P^*, P) is eliminated from the end
                k = k[:, :-1, :-1] - g * k[:, :-1, -1:] * k[:, -1:, :-1] / (1 + g * k[:, -1:, -1:])
            spectrum.append(2 * step[..., None] * k[:, :, 0])
        return torch.fft.irfft(torch.cat(spectrum, -1), n=length)

    def convolve(self, x: Tensor) -> Tensor:
        """y of whole sequences that begin with x (B, T, dim), through `kernel(T)`; the same as `forward`."""
        taps = self.kernel(x.shape[1]).flatten(0, 1).to(accumulation_dtype(x.dtype))
        z, _ = long_convolution(x.repeat_interleave(self.channels, -1), taps)
        return self.output_map(z + (self.skip * x[..., None]).flatten(2))


def _parts(x: Tensor) -> Tensor:
    """(..., N/2) complex -> (..., N), real parts and then imaginary ones."""
    return torch.cat([x.real, x.imag], -1)

"""Liquid-S4: a state space model whose transition depends on its input, in full or by products of recent inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate.mixers.s4d import S4D
from tidegate.nn.parts import token_shift
from tidegate.ops import scan
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

MODES = ("exact", "pb", "kb")
CONTRACTIONS = ("none", "tanh", "lecun")


@register(
    "liquid-s4",
    family="scan",
    paper="liquid-s4",
    title="Liquid Structural State-Space Models",
    arxiv="2209.12951",
    tiny=dict(state_dim=8, mode="kb", degree=3),
    presets={"exact": dict(mode="exact", state_dim=16), "kb": dict(mode="kb"), "listops": dict(state_dim=14, degree=5)},
)
class LiquidS4(S4D):
    """Liquid structural state space model (Liquid-S4) on S4D's diagonal parametrisation.

    Equation, per channel, with a, b, C of the discretised S4D, summed over the states, and c_t(p) = x_t ... x_{t-p+1}::

        exact:  h_t = (a + b x_t) * h_{t-1} + b x_t       z_t = Re sum C h_t + skip * x_t
        kb:     z_t = skip * x_t + sum_{p=1..P} sum_s Re(sum C b^p a^s) c_{t-s}(p)
        pb:     z_t = skip * x_t + sum_s Re(sum C b a^s) x_{t-s} + sum_{p=2..P} Re(sum C b^p) c_t(p)
        y = glu(gelu(z) W)

    - "exact" is the definition. Written out, it is S4's convolution and terms in the products of all subsets of past
      inputs. |a + b x| may be above 1, which no long run survives: `clamp` brings it down to 1.
    - "kb" and "pb" keep the paper's kernels up to order P = `degree`, for products of consecutive inputs; the paper's
      results are those of "pb". Degree 1 is S4D. The official code is not causal: it takes its products from the end of
      the sequence, or turns them round in time.
    - `contraction` of the products: "tanh", or "lecun", 1.7159 tanh(2/3 c).
    - The other options are S4D's, with the paper's steps; "trapezoid" is no rule here.

    "exact" has no kernel of its own: decays, inputs and states of every token go through memory. Measured at dim 256 on
    one core, a layer takes 28 times as long as S4D's of N = 64, and 2.6 times with N = 8.

    Initialisation: S4D's. Source: arXiv 2209.12951; the causal products are ours. Shapes: x, y (B, T, dim).
    State: memory as S4D's, for "kb" one for every order, (P dim, N / 2), and in "exact" h itself; for "kb" and "pb"
    with P > 1 the last products (P - 1, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        mode: str = "pb",
        degree: int = 2,
        contraction: str = "none",
        clamp: bool = True,
        state_dim: int = 64,
        init: str = "legs",
        rule: str = "bilinear",
        dt_min: float = 1e-3,
        dt_max: float = 2e-1,
        step_rescale: float = 1.0,
        step_per_state: bool = False,
        num_systems: int | None = None,
        freeze_input: bool = False,
        output: str = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: seen {mode!r}, wanted one of {', '.join(MODES)}")
        if degree < 1:
            raise ValueError(f"degree: seen {degree}, wanted at least 1, which is S4D")
        if contraction not in CONTRACTIONS:
            raise ValueError(f"contraction: seen {contraction!r}, wanted one of {', '.join(CONTRACTIONS)}")
        if rule == "trapezoid":
            raise ValueError("rule: seen 'trapezoid', wanted 'zoh', 'bilinear' or 'dirac', which have a b")
        system: dict[str, Any] = {
            "state_dim": state_dim,
            "init": init,
            "rule": rule,
            "dt_min": dt_min,
            "dt_max": dt_max,
        }
        system |= {"step_rescale": step_rescale, "step_per_state": step_per_state, "num_systems": num_systems}
        super().__init__(dim, **system, freeze_input=freeze_input, output=output, device=device, dtype=dtype)
        self.mode, self.degree, self.contraction, self.clamp = mode, degree, contraction, clamp

    def state_spec(self) -> dict[str, Any]:
        memories = self.dim * (self.degree if self.mode == "kb" else 1)
        memory = {"memory": ((memories, self.log_real.shape[1]), "complex")}
        if self.mode == "exact" or self.degree == 1:
            return memory
        return {**memory, "products": ((self.degree - 1, self.dim), "input")}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        z, new = (self._exact if self.mode == "exact" else self._products)(x, state, segments)
        y = self.output_map(torch.addcmul(z.to(x.dtype), self.skip, x))
        return zero_padding(y, segments), State(new)

    def _exact(self, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, dict[str, Tensor]]:
        a, b, C = self.discretised(self.step_rescale)
        drive = b * x.to(b.real.dtype)[..., None]  # (B, T, D, N)
        decay = a + drive
        if self.clamp:
            parts = torch.view_as_real(decay)
            decay = decay * torch.rsqrt(parts.square().sum(-1).clamp(min=1))
        h, memory = scan(decay.flatten(2), drive.flatten(2), state=state["memory"].flatten(1), segments=segments)
        z = (h.unflatten(2, tuple(b.shape)) * C).real.sum(-1)
        return z, {"memory": memory.unflatten(1, tuple(b.shape))}

    def _products(self, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, dict[str, Tensor]]:
        a, b, C = self.discretised(self.step_rescale)
        signals, last = [x], []
        for order in range(self.degree - 1):  # c_t(p + 1) = x_t c_{t-1}(p)
            earlier, kept = token_shift(signals[-1], state["products"][:, order], segments)
            signals.append(x * earlier)
            last.append(kept)
        products = [self._contracted(signal) for signal in signals[1:]]
        weights = [b * C]
        for _ in products:
            weights.append(weights[-1] * b)
        new = {"products": torch.stack(last, 1)} if last else {}
        if self.mode == "kb":
            u, weight = torch.cat([x, *products], -1), torch.cat(weights)
            z, memory = diagonal_ssm(u, a.repeat(self.degree, 1), weight, state=state["memory"], segments=segments)
            return z.unflatten(-1, (self.degree, self.dim)).sum(-2), {"memory": memory, **new}
        z, memory = diagonal_ssm(x, a, weights[0], state=state["memory"], segments=segments)
        for weight, product in zip(weights[1:], products, strict=True):
            z = torch.addcmul(z, weight.real.sum(-1).to(z.dtype), product)
        return z, {"memory": memory, **new}

    def _contracted(self, product: Tensor) -> Tensor:
        if self.contraction == "tanh":
            return torch.tanh(product)
        return 1.7159 * torch.tanh(2 / 3 * product) if self.contraction == "lecun" else product

"""What diagonal state space models share: the step from continuous time to tokens, and what comes after a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def complex_weight(x: Tensor) -> Tensor:
    """A complex tensor of a parameter (..., 2), its real and imaginary part, or (..., 1), its real part."""
    return torch.view_as_complex(x) if x.shape[-1] == 2 else torch.complex(x[..., 0], torch.zeros_like(x[..., 0]))


class ChannelMap(nn.Module):
    """What follows a model per channel: GELU, then y = (z W_1) * sigmoid(z W_2) for "glu", or y = z W for "linear".

    "none" gives the models' outputs as they are. x, y (B, T, D).
    """

    def __init__(
        self,
        dim: int,
        output: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output: seen {output!r}, wanted one of {', '.join(OUTPUTS)}")
        self.output = output
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = None if output == "none" else nn.Linear(dim, dim * (2 if output == "glu" else 1), **factory)

    def reset_parameters(self) -> None:
        """As torch.nn.Linear: uniform in ±D^(-1/2)."""
        if self.proj is not None:
            self.proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is None:
            return x
        y = self.proj(functional.gelu(x))
        return functional.glu(y, -1) if self.output == "glu" else y

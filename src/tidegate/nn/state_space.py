"""What diagonal state space models share: HiPPO's eigenvalues, and the step from continuous time to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUTS = ("glu", "linear", "none")
RULES = ("zoh", "bilinear", "dirac")


def discretise(real: Tensor, imaginary: Tensor, step: Tensor, rule: str = "zoh") -> tuple[Tensor, Tensor]:
    """From h' = l h + u with l = real + i imaginary to h_t = decay h_{t-1} + scale u_t; both complex.

    Equation, z = step l::

        zoh:       decay = exp(z),                   scale = (exp(z) - 1) / l
        bilinear:  decay = (1 + z/2) / (1 - z/2),    scale = step / (1 - z/2)
        dirac:     decay = exp(z),                   scale = 1

    `real`, `imaginary` and `step` broadcast. "zoh" holds u over a step, "dirac" takes it as an impulse. Exact for short
    steps, where exp(z) - 1 as it stands would be the difference of two numbers that are nearly the same.

    Raises ValueError for another rule. Source: HTTYH, arXiv 2206.12037; S4D, 2206.11893.

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
    if rule == "dirac":
        return decay, torch.ones_like(decay)
    minus_one = torch.complex(torch.expm1(a) * torch.cos(b) - 2 * torch.sin(b / 2).square(), modulus * torch.sin(b))
    tiny = a * a + b * b < 1e-12
    quotient = minus_one / torch.complex(torch.where(tiny, 1, a), torch.where(tiny, 0, b))
    return decay, step * torch.where(tiny, torch.complex(1 + a / 2, b / 2), quotient)


def legs(states: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS without its term of rank one, which leaves a normal matrix: S = V diag(-1/2 + i w) V^*.

    Returns w (N,) in ascending order, so that the first half is negative, the columns V (N, N), and the input vector
    B (N,) with entries sqrt(2 n + 1); float64 and complex128. Source: arXiv 2008.07669; 2206.12037, table 1.

    >>> w, V, B = legs(4)
    >>> bool(torch.allclose(w, -w.flip(0))), bool(torch.allclose(V @ V.mH, torch.eye(4).to(V)))
    (True, True)
    """
    order = torch.arange(states, dtype=torch.float64)
    root = torch.sqrt(2 * order + 1)
    outer = torch.outer(root, root)
    # S + 1/2: minus the products below the diagonal, plus half of all of them; skew-symmetric.
    skew = outer / 2 - outer.tril(-1) - torch.diag(order + 0.5)
    w, vectors = torch.linalg.eigh(-1j * skew)
    return w, vectors, root


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

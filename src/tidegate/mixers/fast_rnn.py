"""FastRNN and FastGRNN: a weighted residual connection over an Elman network, and one that is gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellMixer
from tidegate.nn.mixer import accumulation_dtype
from tidegate.ops.cell import Cell
from tidegate.registry import register

NONLINEARITIES = ("tanh", "relu", "sigmoid")
GATES = ("sigmoid", "tanh")
SPREAD = 0.1  # of the weights at first
ZETA, NU = 1.0, -4.0  # at first, before their sigmoid

PLAIN = """
    n = {nonlinearity}(W @ x + U @ h)
    h = alpha * n + beta * h
"""
# W x and U h serve both: the gate's bias is added to them as what it is more than the candidate's.
GATED = """
    a = W @ x + U @ h
    z = {gate}(a + more)
    n = {nonlinearity}(a)
    h = (zeta * (1 - z) + nu) * n + z * h
"""


@register(
    "fast-rnn",
    family="cell",
    paper="recurrent-cells",
    title="FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent Neural Network",
    arxiv="1901.02358",
    presets={"fast-grnn": dict(gated=True), "heads": dict(num_heads=4)},
)
class FastRNN(CellMixer):
    """FastRNN, and with `gated` FastGRNN, hidden size dim.

    Equation, with numbers alpha, beta, zeta and nu between 0 and 1 that are learnt, one each for the whole layer::

        n = tanh(W x_t + b + U h_{t-1})
        y_t = h_t = alpha * n + beta * h_{t-1}                                           FastRNN

        z = sigmoid(W x_t + b_z + U h_{t-1})            the same W and U as in n
        y_t = h_t = (zeta * (1 - z) + nu) * n + z * h_{t-1}                              FastGRNN

    - `shares` (2) holds alpha and beta, or zeta and nu, as logits, to which a sigmoid is applied.
    - `alpha_logit` is where alpha starts; beta starts at 1 - sigmoid(alpha_logit). The longer the sequences, the
      smaller an alpha suits them, as 1 / length in the paper.
    - `nonlinearity` of n is "tanh", "relu" or "sigmoid", `gate_nonlinearity` of z "sigmoid" or "tanh".
    - `forget_bias` is b_z at initialisation (FastGRNN).
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - What makes FastGRNN small, matrices of low rank, sparse and quantised, is no part of the cell and not here.

    Initialisation: weights normal with deviation 0.1, b = 1, and the logits of zeta and nu 1 and -4, as in the authors'
    code.
    Source: arXiv 1901.02358 and its code; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        gated: bool = False,
        nonlinearity: str = "tanh",
        gate_nonlinearity: str = "sigmoid",
        alpha_logit: float = -3.0,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.gated, self.nonlinearity, self.gate_nonlinearity = dim, gated, nonlinearity, gate_nonlinearity
        self.alpha_logit, self.forget_bias = alpha_logit, forget_bias
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(
                f"nonlinearity: seen {nonlinearity!r}, wanted one of {', '.join(map(repr, NONLINEARITIES))}"
            )
        if gate_nonlinearity not in GATES:
            raise ValueError(f"gate_nonlinearity: seen {gate_nonlinearity!r}, wanted 'sigmoid' or 'tanh'")
        if gate_nonlinearity != "sigmoid" and not gated:
            raise ValueError(f"gate_nonlinearity: seen {gate_nonlinearity!r}, but there is no gate without gated=True")
        self.shares = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if gated else None
        equations = (GATED if gated else PLAIN).format(nonlinearity=nonlinearity, gate=gate_nonlinearity)
        self._build(Cell(equations, "h"), num_heads, device, dtype, vectors=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.normal_(weight, std=SPREAD)
        nn.init.ones_(self.bias_ih)
        self.shares[0], self.shares[1] = (ZETA, NU) if self.gated else (self.alpha_logit, -self.alpha_logit)
        if self.gate_bias is not None:
            nn.init.constant_(self.gate_bias, self.forget_bias)

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        wide = accumulation_dtype(self.shares.dtype)  # in half precision a share near 1 would be 1
        vectors = torch.sigmoid(self.shares.to(wide))[:, None].expand(-1, self.dim)
        if self.gate_bias is not None:
            more = self.gate_bias.to(wide) - self.bias_ih.to(wide)
            vectors = torch.cat([more[None], vectors])
        return self.bias_ih, vectors

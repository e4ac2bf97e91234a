"""qLSTM: an LSTM without what makes it nonlinear in time, inside of a gated block with a short convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution
from tidegate.ops import scan
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

GATES = ("reversed-sigmoid", "sigmoid")


@register(
    "qlstm",
    family="scan",
    paper="dsf",
    title="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
    "Networks",
    arxiv="2405.15731",
    tiny=dict(expand=1.5),
    presets={"plain": dict(gate="sigmoid")},
)
class QLSTM(Mixer):
    """Quasi-LSTM (qLSTM): gates that see the input alone, no tanh; the memory is an elementwise scan.

    Equation, hidden size W = expand dim::

        branch, u = x W_b, x W_u        u <- conv(u)
        f_t, i_t, o_t = u W_f + b_f, u W_i + b_i, u W_o + b_o
        c_t = keep_t * c_{t-1} + sigmoid(i_t) * u_t
        y = (gelu(branch) * sigmoid(o) * c) W_y

        reversed-sigmoid:  keep_t = sigmoid(-f_t)^relu(exponent)
        sigmoid:           keep_t = sigmoid(f_t)

    - The reversed sigmoid is the forget gate of Mamba-2: sigmoid(-f)^a = exp(-a softplus(f)), a step size softplus(f)
      times a rate a; it is computed as such. `exponent` is where a starts, one number for the layer, learnt unless
      `learn_exponent=False`. The paper compares the two gates ("plain" is the other).
    - Input and output gate are independent of the forget gate, unlike those of a state space model.
    - `forget_bias`: keep starts at sigmoid(forget_bias)^exponent; above 0 the unit starts by remembering.
    - No activation follows the convolution.

    Initialisation: weights of x normal with deviation dim^(-1/2), the others W^(-1/2); biases zero but for the forget
    gate's; the convolution as it initialises itself.
    Source: arXiv 2405.15731; the block is that of Hippogriff and Griffin, 2402.19427. Shapes: x, y (B, T, dim).
    State: convolution (conv_width - 1, W), memory (W).
    """

    no_weight_decay = ("exponent_parameter",)

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        gate: str = "reversed-sigmoid",
        exponent: float = 1.0,
        learn_exponent: bool = True,
        forget_bias: float = 0.0,
        conv_width: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand, self.gate, self.exponent = dim, expand, gate, exponent
        self.learn_exponent, self.forget_bias, self.conv_width = learn_exponent, forget_bias, conv_width
        self.width = int(expand * dim)
        if self.width < 1 or self.width != expand * dim:
            raise ValueError(f"expand: {expand:g} * dim = {expand * dim:g} channels, wanted a whole number")
        if gate not in GATES:
            raise ValueError(f"gate: seen {gate!r}, wanted 'reversed-sigmoid' or 'sigmoid'")
        if not exponent > 0:
            raise ValueError(f"exponent: seen {exponent}, wanted more than 0")
        if gate == "sigmoid" and exponent != 1:
            raise ValueError(f"exponent: seen {exponent}, wanted 1 for the plain gate, which has none")
        if conv_width < 1:
            raise ValueError(f"conv_width: seen {conv_width}, wanted at least 1 (which is a gain per channel)")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * self.width, bias=False, **factory)
        self.convolution = ShortConvolution(self.width, conv_width, bias=True, activation=False, **factory)
        self.gate_proj = nn.Linear(self.width, 3 * self.width, **factory)
        learnt = gate == "reversed-sigmoid" and learn_exponent
        self.exponent_parameter = nn.Parameter(torch.empty((), **factory)) if learnt else None
        self.o_proj = nn.Linear(self.width, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for part in (self.in_proj, self.gate_proj, self.o_proj):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        nn.init.zeros_(self.gate_proj.bias)
        self.gate_proj.bias[: self.width] = self.forget_bias if self.gate == "sigmoid" else -self.forget_bias
        self.convolution.reset_parameters()
        if self.exponent_parameter is not None:
            nn.init.constant_(self.exponent_parameter, self.exponent)

    def state_spec(self) -> dict[str, Any]:
        return {"convolution": ((self.conv_width - 1, self.width), "input"), "memory": (self.width,)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        branch, u = self.in_proj(x).chunk(2, -1)
        u, tail = self.convolution(u, state["convolution"], segments)
        forget, write, read = self.gate_proj(u).chunk(3, -1)
        keep = self._keep(forget.to(accumulation_dtype(x.dtype)))  # 0.99 has no room in half precision
        c, memory = scan(keep, torch.sigmoid(write) * u, state=state["memory"], segments=segments)
        y = self.o_proj(functional.gelu(branch) * torch.sigmoid(read) * c.to(x.dtype))
        return y, State(convolution=tail, memory=memory)

    def _keep(self, logits: Tensor) -> Tensor:
        if self.gate == "sigmoid":
            return torch.sigmoid(logits)
        exponent: Any = self.exponent
        if self.exponent_parameter is not None:
            exponent = functional.relu(self.exponent_parameter.to(logits.dtype))
        return torch.exp(-exponent * functional.softplus(logits))

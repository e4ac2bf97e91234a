"""Long short-term memory and its variants: peepholes, coupled gates, normalised gates, heads."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer, check_chrono
from tidegate.ops.cell import Cell
from tidegate.registry import register

EPS = 1e-5  # of the layer norms


@register(
    "lstm",
    family="cell",
    paper="recurrent-cells",
    title="Long Short-Term Memory",
    presets={
        "peephole": dict(peephole=True),
        "coupled": dict(coupled=True),
        "layer-norm": dict(layer_norm=True),
        "heads": dict(num_heads=4),
    },
)
class LSTM(CellMixer):
    """Long short-term memory (LSTM), hidden size dim.

    Equation::

        i, f, o = sigmoid(W x_t + b + U h_{t-1} + b')        g = tanh(the same with weights of its own)
        c_t = f * c_{t-1} + i * g                            y_t = h_t = o * tanh(c_t)

    - Parameters, their order i, f, g, o and the two biases are those of torch.nn.LSTM and LSTMCell.
    - `peephole` adds p_i * c_{t-1}, p_f * c_{t-1} and p_o * c_t inside of the gates. `coupled` has no input gate of its
      own, i = 1 - f (then the order is f, g, o). `layer_norm` normalises U h over all gates of a head, with a gain, and
      c_t inside of the last tanh, with gain and shift.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - `forget_bias` is the forget gate's bias at initialisation, exactly: PyTorch adds two biases, so one of them is
      zero. `chrono_length` instead draws biases for memories of up to that many tokens, b_f = log U(1, length - 1) and
      b_i = -b_f; what is to be remembered over long lags is hardly learnt without one of the two.

    Source: Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000; peepholes Gers & Schmidhuber 2000; coupled
    gates arXiv 1503.04069; layer norm 1607.06450; heads 2412.07752; chrono initialisation 1804.11188.
    Shapes: x, y (B, T, dim). State: h (dim), c (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.peephole, self.coupled, self.layer_norm = dim, peephole, coupled, layer_norm
        self.forget_bias, self.chrono_length = forget_bias, chrono_length
        check_chrono(chrono_length)
        cell = Cell(_equations(peephole, coupled, layer_norm), "h c")
        self._build(cell, num_heads, device, dtype, second_bias=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±dim^(-1/2) but for the biases of the forget gate and, with `chrono_length`, the input gate.

        Peepholes start uniform too, gains at 1 and shifts at 0.
        """
        super().reset_parameters()
        forget = self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length)
        self._set_bias("W_f", forget)
        if self.chrono_length is not None and not self.coupled:
            self._set_bias("W_i", -forget)
        for name in self.cell.vectors:
            if not name.startswith("p_"):
                self._set_vector(name, 0.0 if name == "shift" else 1.0)


def _equations(peephole: bool, coupled: bool, layer_norm: bool) -> str:
    gates = ["f", "g", "o"] if coupled else ["i", "f", "g", "o"]
    lines = []
    inside = {k: f"W_{k} @ x + U_{k} @ h" for k in gates}
    if layer_norm:
        centred = [f"u_{k} - m" for k in gates]
        lines += [f"u_{k} = U_{k} @ h" for k in gates]
        lines += [f"m = mean({', '.join(f'u_{k}' for k in gates)})"]
        lines += [f"s = 1 / sqrt(mean({', '.join(f'({x}) ** 2' for x in centred)}) + {EPS})"]
        inside = {k: f"W_{k} @ x + gain_{k} * (u_{k} - m) * s" for k in gates}
    if peephole:
        inside |= {k: f"{inside[k]} + p_{k} * c" for k in gates if k != "g"}
    lines += [f"i = sigmoid({inside['i']})"] if not coupled else []
    lines += [f"f = sigmoid({inside['f']})", f"g = tanh({inside['g']})"]
    late = [f"o = sigmoid({inside['o']})"]
    lines += [] if peephole else late
    lines += ["c = f * c + (1 - f) * g" if coupled else "c = f * c + i * g"]
    lines += late if peephole else []
    if layer_norm:
        lines += ["d = c - mean(c)", f"h = o * tanh(gain * d / sqrt(mean(d ** 2) + {EPS}) + shift)"]
    else:
        lines += ["h = o * tanh(c)"]
    return "\n".join(lines)

"""Long short-term memory and its variants: peepholes, coupled gates, normalised gates, heads, projection, ablations."""

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
        "1997": dict(forget_gate=False),
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
    - `hidden_size` > dim makes the cell that wide and projects it, h_t = W_r (o * tanh(c_t)), which is what U reads.
      That is torch.nn.LSTM(dim, hidden_size, proj_size=dim), `weight_hr` included.
    - What an LSTM can do without, one by one: `input_gate`, `forget_gate` and `output_gate` = False set i, f or o to 1
      (no forget gate is the cell of 1997); `input_activation` and `output_activation` = False leave out the first or
      the last tanh. Their parameters are gone. `gate_recurrence` adds instead: every gate also reads the gates of the
      token before, through matrices of their own, and they become states.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - `forget_bias` is the forget gate's bias at initialisation, exactly: PyTorch adds two biases, so one of them is
      zero. `chrono_length` instead draws biases for memories of up to that many tokens, b_f = log U(1, length - 1) and
      b_i = -b_f; what is to be remembered over long lags is hardly learnt without one of the two.

    Source: Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000; peepholes Gers & Schmidhuber 2000; coupled
    gates and the ablations arXiv 1503.04069; projection 1402.1128; layer norm 1607.06450; heads 2412.07752; chrono
    initialisation 1804.11188. Shapes: x, y (B, T, dim). State: h (dim), c (hidden_size or dim),
    and with `gate_recurrence` i, f, o (as c).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        hidden_size: int | None = None,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        input_gate: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        input_activation: bool = True,
        output_activation: bool = True,
        gate_recurrence: bool = False,
        forget_bias: float = 1.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.hidden_size = dim, hidden_size
        self.peephole, self.coupled, self.layer_norm = peephole, coupled, layer_norm
        self.input_gate, self.forget_gate, self.output_gate = input_gate, forget_gate, output_gate
        self.input_activation, self.output_activation = input_activation, output_activation
        self.gate_recurrence, self.forget_bias, self.chrono_length = gate_recurrence, forget_bias, chrono_length
        check_chrono(chrono_length)
        if coupled and not (input_gate and forget_gate):
            missing = "forget_gate" if input_gate else "input_gate"
            raise ValueError(f"coupled: seen True with {missing}=False, wanted both gates, which are one then")
        if hidden_size is not None and hidden_size <= dim:
            raise ValueError(f"hidden_size: seen {hidden_size}, wanted more than dim = {dim}, or None")
        if hidden_size is not None and num_heads != 1:
            raise ValueError(f"num_heads: seen {num_heads} with hidden_size, whose projection mixes heads; wanted 1")
        gates = [k for k, there in self._gates().items() if there and k != "g"]
        if gate_recurrence and not gates:
            raise ValueError("gate_recurrence: seen True without a gate, wanted at least one of them")
        if gate_recurrence and hidden_size is not None:
            raise ValueError(
                "gate_recurrence: seen True with hidden_size, whose matrices are narrower; wanted one of both"
            )
        cell = Cell(self._equations(), ["h", "c", *gates * gate_recurrence])
        self._build(cell, num_heads, device, dtype, second_bias=not gate_recurrence, width=hidden_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±hidden_size^(-1/2) but for the biases of the forget and, with `chrono_length`, the input gate.

        Peepholes start uniform too, gains at 1 and shifts at 0.
        """
        super().reset_parameters()
        forget = self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length)
        if self.forget_gate:
            self._set_bias("W_f", forget)
        if self.chrono_length is not None and self.input_gate and not self.coupled:
            self._set_bias("W_i", -forget)
        for name in self.cell.vectors:
            if not name.startswith("p_"):
                self._set_vector(name, 0.0 if name == "shift" else 1.0)

    def _gates(self) -> dict[str, bool]:
        """Which of them there are."""
        return dict(i=self.input_gate and not self.coupled, f=self.forget_gate, g=True, o=self.output_gate)

    def _equations(self) -> str:
        there = self._gates()
        gates = [k for k in there if there[k]]
        lines = []
        inside = {k: f"W_{k} @ x + U_{k} @ h" for k in gates}
        if self.layer_norm:
            centred = [f"u_{k} - m" for k in gates]
            lines += [f"u_{k} = U_{k} @ h" for k in gates]
            lines += [f"m = mean({', '.join(f'u_{k}' for k in gates)})"]
            lines += [f"s = 1 / sqrt(mean({', '.join(f'({x}) ** 2' for x in centred)}) + {EPS})"]
            inside = {k: f"W_{k} @ x + gain_{k} * (u_{k} - m) * s" for k in gates}
        if self.peephole:
            inside |= {k: f"{inside[k]} + p_{k} * c" for k in gates if k != "g"}
        i, f, o = "ifo"
        if self.gate_recurrence:  # the old gates keep their names until the end
            i, f, o = "i_now", "f_now", "o_now"
            sees = [k for k in gates if k != "g"]
            inside |= {k: " + ".join([inside[k], *(f"R_{j}{k} @ {j}" for j in sees)]) for k in sees}
        lines += [f"{name} = sigmoid({inside[k]})" for k, name in (("i", i), ("f", f)) if there[k]]
        lines += [f"g = tanh({inside['g']})" if self.input_activation else f"g = {inside['g']}"]
        late = [f"{o} = sigmoid({inside['o']})"] if there["o"] else []
        lines += [] if self.peephole else late
        share = f"(1 - {f}) * g" if self.coupled else f"{i} * g" if there["i"] else "g"
        lines += [f"c = {f} * c + {share}" if there["f"] else f"c = c + {share}"]
        lines += late if self.peephole else []
        read = "c"
        if self.layer_norm:
            lines += ["d = c - mean(c)"]
            read = f"gain * d / sqrt(mean(d ** 2) + {EPS}) + shift"
        read = f"tanh({read})" if self.output_activation else f"({read})"
        out = f"{o} * {read}" if there["o"] else read
        lines += [f"h = {out}" if self.hidden_size is None else f"h = R @ ({out})"]
        lines += [f"{k} = {k}_now" for k in gates if k != "g" and self.gate_recurrence]
        return "\n".join(lines)

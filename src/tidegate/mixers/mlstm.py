"""mLSTM: the matrix memory of xLSTM, as the layer of xLSTM 7B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import check_heads, split_heads
from tidegate.ops import linear_attention, mlstm
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "mlstm",
    family="linear_attention",
    paper="tfla-mlstm",
    title="xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference",
    arxiv="2503.13427",
    tiny=dict(num_heads=2),
    presets={"7b": dict(num_heads=8), "sigmoid": dict(input_gate="sigmoid")},
)
class MLSTM(Mixer):
    """Matrix LSTM with an exponential or a sigmoid input gate.

    Equation, per head (C is K x V, n a vector of K)::

        log f_t = log sigmoid(cap(f~_t)),   log i_t = cap(i~_t) or log sigmoid(cap(i~_t)),   cap(z) = 15 tanh(z / 15)
        C_t = f_t C_{t-1} + i_t k_t v_t^T        n_t = f_t n_{t-1} + i_t k_t        (kept relative to a maximum)
        h_t = C_t^T q_t / max(|n_t . q_t|, 1),   q scaled by 1 / sqrt(K)
        y = (sigmoid(o~) * LayerNorm_head(h)) W_o

    - This is the xLSTM 7B layer; `mlstm-pre-up` is the block of the first xLSTM paper, with its convolution inside.
    - `input_gate="sigmoid"` is the cheaper mLSTMsig of the TFLA paper: without normaliser, h_t = C_t^T q_t, so gated
      linear attention. `normalise=True` gives it one; the exponential gate cannot do without.
    - The norm is part of the gating: where h is small beside the root of `norm_eps` the output is suppressed.
    - `input_bias` -10 closes the input gate at first and spares the start of training its spikes; the forget gates
      start at `forget_bias`, from the first head's value to the last one's.

    Initialisation (official code): gates zero but for their biases; W_o N(0, (2 / (num_layers sqrt(dim)))^2), the other
    projections N(0, 2 / (5 dim)).
    Source: arXiv 2503.13427, 2503.14376 (TFLA), 2405.04517. Shapes: x, y (B, T, dim); K = expand_k dim / num_heads,
    V = expand_v dim / num_heads.
    State: memory (H, K, V); with the normaliser also normaliser (H, K) and maximum (H).
    """

    no_weight_decay = ("gate_bias",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        input_gate: str = "exp",
        normalise: bool | None = None,
        gate_cap: float | None = 15.0,
        input_bias: float = -10.0,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        norm: str = "layer",
        norm_eps: float = 1e-6,
        use_output_gate: bool = True,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand_k, self.expand_v = dim, num_heads, expand_k, expand_v
        self.input_gate, self.normalise, self.gate_cap, self.input_bias = input_gate, normalise, gate_cap, input_bias
        self.forget_bias, self.norm, self.norm_eps = forget_bias, norm, norm_eps
        self.use_output_gate, self.num_layers = use_output_gate, num_layers
        self.key_dim = check_heads(dim, num_heads, expand_k, "expand_k")
        self.value_dim = check_heads(dim, num_heads, expand_v, "expand_v")
        check_shared_options(norm, gate_cap)
        self.normalised = check_input_gate(input_gate, normalise)
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.widths = (keys, keys, values, values if use_output_gate else 0, 2 * num_heads)  # q, k, v, o~, gates

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False, **factory)
        self.gate_bias = nn.Parameter(torch.empty(2 * num_heads, **factory))  # input, forget
        self.norm_weight = nn.Parameter(torch.empty(values, **factory))
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        nn.init.normal_(self.in_proj.weight, std=(2 / (5 * self.dim)) ** 0.5)
        nn.init.zeros_(self.in_proj.weight[-2 * self.num_heads :])
        nn.init.normal_(self.o_proj.weight, std=2 / (self.num_layers * self.dim**0.5))
        self.gate_bias[: self.num_heads].fill_(self.input_bias)
        self.gate_bias[self.num_heads :].copy_(torch.linspace(*self.forget_bias, self.num_heads))
        self.norm_weight.fill_(1.0)

    def state_spec(self) -> dict[str, Any]:
        return memory_spec(self.num_heads, self.key_dim, self.value_dim, self.normalised)

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        q, k, v, output, gates = self.in_proj(x).split(self.widths, -1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        log_input, log_decay = log_gates(gates, self.gate_bias, self.gate_cap, self.input_gate)
        h, last = remember(q, k, v, log_input, log_decay, state, segments)
        y = norm_per_head(h, self.norm_weight, self.norm, self.norm_eps)
        if self.use_output_gate:
            y = torch.sigmoid(output) * y
        return self.o_proj(y), State(last)


# -- shared with the block of the first paper --------------------------------------------------------------------------
def memory_spec(num_heads: int, key_dim: int, value_dim: int, normalise: bool = True) -> dict[str, Any]:
    """The state of `ops.mlstm`, or of linear attention."""
    normaliser = {"normaliser": (num_heads, key_dim), "maximum": (num_heads,)} if normalise else {}
    return {"memory": (num_heads, key_dim, value_dim), **normaliser}


def log_gates(gates: Tensor, bias: Tensor, cap: float | None, input_gate: str) -> tuple[Tensor, Tensor]:
    """log i and log sigmoid(f~) from the two halves of `gates`, (B, T, H) each, at least float32."""
    wide = accumulation_dtype(gates.dtype)  # a decay of 0.999 has no room in half precision
    gates = gates.to(wide) + bias.to(wide)
    if cap is not None:
        gates = cap * torch.tanh(gates / cap)
    log_input, forget = gates.chunk(2, -1)
    return (functional.logsigmoid(log_input) if input_gate == "sigmoid" else log_input), functional.logsigmoid(forget)


def remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    state: State,
    segments: Segments | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """h (B, T, H, V), q scaled by 1 / sqrt(K), and the entries of `memory_spec`; normalised where `state` has one."""
    scale = q.shape[-1] ** -0.5
    if "normaliser" not in state:
        k = log_input.exp().to(k.dtype)[..., None] * k
        h, memory = linear_attention(q, k, v, log_decay, scale=scale, state=state["memory"], segments=segments)
        return h, {"memory": memory}
    names = ("memory", "normaliser", "maximum")
    before = tuple(state[name] for name in names)
    h, last = mlstm(q, k, v, log_input, log_decay, scale=scale, state=before, segments=segments)
    return h, dict(zip(names, last, strict=True))


def norm_per_head(h: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    """(B, T, H, V) -> (B, T, H V), every head brought to unit variance ("layer") or mean square ("rms")."""
    norm = functional.layer_norm if kind == "layer" else functional.rms_norm
    return norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight


def check_input_gate(input_gate: str, normalise: bool | None) -> bool:
    """Whether there is a normaliser. Raises ValueError for another gate, or an exponential one without normaliser."""
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"input_gate: seen {input_gate!r}, wanted 'exp' or 'sigmoid'")
    if input_gate == "exp" and normalise is False:
        raise ValueError("normalise: the exponential gate needs its normaliser; leave it out with input_gate='sigmoid'")
    return input_gate == "exp" if normalise is None else normalise


def check_shared_options(norm: str, gate_cap: float | None) -> None:
    """Raises ValueError for what `norm_per_head` and `log_gates` do not take."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm: seen {norm!r}, wanted 'layer' or 'rms'")
    if gate_cap is not None and not gate_cap > 0:
        raise ValueError(f"gate_cap: seen {gate_cap}, wanted more than 0, or None for no cap")

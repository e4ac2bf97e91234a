"""tidegate's side: the same functions by the same names. Layers and models also draw the weights for both sides."""

from __future__ import annotations

from typing import Any

import torch
from adapter import adapts
from torch.nn import functional

from tidegate import mixers, ops
from tidegate.infer import compile_step
from tidegate.models.language import LanguageModel
from tidegate.ops.mlstm import mlstm
from tidegate.ops.selective_scan import selective_scan


def _scale(q: Any) -> float:
    return q.shape[-1] ** -0.5


# -- ops ---------------------------------------------------------------------------------------------------------------
@adapts("op/linear_attention", "tidegate")
def linear_attention(q: Any, k: Any, v: Any, log_decay: Any = None) -> Any:
    return ops.linear_attention(q, k, v, log_decay, scale=_scale(q))[0]


adapts("op/linear_attention/head", "tidegate")(linear_attention)
adapts("op/linear_attention/key", "tidegate")(linear_attention)


@adapts("op/ssd", "tidegate")
def ssd(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    c, b = (part.expand(*part.shape[:2], x.shape[2], -1) for part in (c, b))
    return ops.linear_attention(c, b, dt.unsqueeze(-1) * x, a * dt)[0]


@adapts("op/delta_rule", "tidegate")
def delta_rule(q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None) -> Any:
    return ops.delta_rule(q, k, v, beta, log_decay, scale=_scale(q))[0]


adapts("op/delta_rule/head", "tidegate")(delta_rule)
adapts("op/delta_rule/key", "tidegate")(delta_rule)


@adapts("op/dplr", "tidegate")
def dplr(q: Any, k: Any, v: Any, a: Any, b: Any, log_decay: Any) -> Any:
    return ops.dplr(q, k, v, a, b, log_decay, scale=_scale(q))[0]


@adapts("op/scan", "tidegate")
def scan(a: Any, b: Any) -> Any:
    return ops.scan(a, b)[0]


@adapts("op/attention", "tidegate")
def attention(q: Any, k: Any, v: Any) -> Any:
    return ops.attention(q, k, v)[0]


@adapts("op/selective_scan", "tidegate")
def selective(u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return selective_scan(u, dt, a, b, c, d=d)[0]


@adapts("op/mlstm", "tidegate")
def exponential(q: Any, k: Any, v: Any, i: Any, f: Any) -> Any:
    return mlstm(q, k, v, i, functional.logsigmoid(f), scale=_scale(q))[0]


# The cells of the mixers: x (B, T, G, H, d), what the gates get from the input; matrices (G, H, d, d).
def _cell(name: str) -> None:
    run = mixers.build(name, dim=1, num_heads=1).cell

    @adapts(f"op/{name}", "tidegate")
    def cell(x: Any, matrices: Any, bias: Any = None) -> Any:
        vectors = None if bias is None else bias.flatten()[None]
        return run(x.flatten(3), matrices, vectors)[0].unflatten(-1, x.shape[3:])


for name in ("slstm", "lstm", "gru"):
    _cell(name)


# -- layers and models -------------------------------------------------------------------------------------------------
def _gated_deltanet(dim: int) -> dict[str, Any]:
    """The shape of Qwen3-Next's layers: twice as many value heads as key heads, heads of 64."""
    return {
        "num_heads": dim // 64,
        "num_value_heads": dim // 32,
        "head_dim": 64,
        "expand_v": 1.0,
        "norm_eps": 1e-6,
    }


OPTIONS: dict[str, Any] = {
    "gated-deltanet": _gated_deltanet,
    "mamba2": lambda dim: {"state_dim": 128, "head_dim": 64},
    "slstm": lambda dim: {"recurrent_init": "uniform"},  # zeros would leave the recurrent matrices out of the outputs
}


def _options(name: str, dim: int) -> dict[str, Any]:
    return OPTIONS[name](dim) if name in OPTIONS else {}


def _layer(name: str) -> None:
    @adapts(f"layer/{name}", "tidegate")
    def build(options: dict[str, Any], weights: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        mixer = mixers.build(name, dim=options["dim"], **_options(name, options["dim"]))
        if weights is None:
            return dict(mixer.state_dict())
        mixer.load_state_dict(weights)
        return mixer, lambda x: mixer(x)[0], dict


def _stepped(module: Any) -> Any:
    """Tokens one at a time, through the compiled step."""
    step = state = None

    def advance(token: Any) -> Any:
        nonlocal step, state
        if step is None:
            step, state = compile_step(module, token.shape[0]), module.init_state(token.shape[0])
        y, state = step(token[:, None], state)
        return y[:, 0]

    return advance


def _step(name: str) -> None:
    @adapts(f"decode/{name}", "tidegate")
    def build(options: dict[str, Any], weights: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        mixer = mixers.build(name, dim=options["dim"], **_options(name, options["dim"])).eval()
        if weights is None:
            return dict(mixer.state_dict())
        mixer.load_state_dict(weights)
        return _stepped(mixer)


def _model(name: str, **given: Any) -> None:
    @adapts(f"decode/model/{name}", "tidegate")
    def build(options: dict[str, Any], weights: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        dim, layers = options["dim"], options["layers"]
        pattern = [(name, _options(name, dim))] * layers
        model = LanguageModel(vocab_size=options["vocab"], dim=dim, layers=pattern, **given).eval()
        if weights is None:
            return dict(model.state_dict())
        model.load_state_dict(weights)
        return _stepped(model)


for name in ("lstm", "gru", "rg-lru"):
    _layer(name)
    _step(name)
for name in ("mamba", "mamba2", "gated-deltanet", "slstm"):
    _layer(name)
_model("mamba", feed_forward="none", norm_eps=1e-5)
_model("mamba2", feed_forward="none", norm_eps=1e-5)
_model("gated-deltanet", feed_forward="swiglu", norm_eps=1e-6)

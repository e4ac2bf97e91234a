"""What is compared with peers: functions by name, the inputs both sides are given, and what this library aims at.

`op/...` are functions of tensors, `layer/...` whole mixers with their projections, `decode/...` one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
HEADS, KEY, VALUE, CHANNELS, STATE = 4, 64, 64, 512, 16
LOOP = 20.0  # the factor aimed at, forward and backward, where the peer loops over tokens in Python
SERIAL = 15.0  # the same where no form but a loop is known, so that ours is one too, in a kernel
FORWARD, LAYER, DECODE = 1.5, 1.5, 3.0
CELLS = {"layer/lstm": 0.9, "layer/gru": 1.3}  # PyTorch's LSTM runs at the machine's limit


@dataclass(frozen=True)
class Op:
    """How inputs (B, T, ...) of an op are drawn, and by what factor its training is to be faster."""

    draw: Callable[[int, int], Tensors]
    target: float | None
    loop: float = LOOP  # the factor where the peer loops over tokens in Python


def _unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=-1)


def _decay(*shape: int) -> Tensor:
    return functional.logsigmoid(torch.randn(*shape) + 4)


def _qkv(B: int, T: int) -> Tensors:
    return {"q": _unit(B, T, HEADS, KEY), "k": _unit(B, T, HEADS, KEY), "v": torch.randn(B, T, HEADS, VALUE)}


def _head(B: int, T: int) -> Tensors:
    return {"log_decay": _decay(B, T, HEADS)}


def _key(B: int, T: int) -> Tensors:
    return {"log_decay": _decay(B, T, HEADS, KEY)}


def _beta(B: int, T: int) -> Tensors:
    return {"beta": torch.rand(B, T, HEADS)}


def _steps(*shape: int) -> Tensor:
    """Time steps as at Mamba's initialisation, log-uniform in [0.001, 0.1]."""
    return 10 ** (-3 + 2 * torch.rand(*shape))


def _ssd(B: int, T: int) -> Tensors:
    heads, state = 8, 128  # a layer of width 256
    return {
        "x": torch.randn(B, T, heads, 64),
        "dt": _steps(B, T, heads),
        "a": -(1 + 15 * torch.rand(heads)),
        "b": torch.randn(B, T, 1, state) / state**0.5,
        "c": torch.randn(B, T, 1, state),
    }


def _selective(B: int, T: int) -> Tensors:
    return {
        "u": torch.randn(B, T, CHANNELS),
        "dt": _steps(B, T, CHANNELS),
        "a": -torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1),
        "b": torch.randn(B, T, STATE),
        "c": torch.randn(B, T, STATE),
        "d": torch.ones(CHANNELS),
    }


def _rwkv7(B: int, T: int) -> Tensors:
    removed = _unit(B, T, HEADS, KEY)
    return {
        **_qkv(B, T),
        "a": -removed,
        "b": torch.rand(B, T, HEADS, 1) * removed,
        "log_decay": -0.6065 * torch.randn(B, T, HEADS, KEY).sub(3).sigmoid(),
    }


def _scan(B: int, T: int) -> Tensors:
    return {"a": torch.randn(B, T, 1024).add(4).sigmoid(), "b": torch.randn(B, T, 1024)}


def _mlstm(B: int, T: int) -> Tensors:
    q, k, v = (torch.randn(B, T, HEADS, width) for width in (KEY, KEY, VALUE))
    return {"q": q, "k": k, "v": v, "i": torch.randn(B, T, HEADS), "f": torch.randn(B, T, HEADS) + 4}


def _cell(B: int, T: int, gates: int) -> Tensors:
    """What the gates get from the input, and block-diagonal recurrent matrices as at an LSTM's initialisation."""
    return {
        "x": torch.randn(B, T, gates, HEADS, VALUE),
        "matrices": (2 * torch.rand(gates, HEADS, VALUE, VALUE) - 1) * (HEADS * VALUE) ** -0.5,
        "cotangent": torch.randn(B, T, HEADS, VALUE),
    }


def _slstm(B: int, T: int) -> Tensors:
    inputs = _cell(B, T, 4)
    inputs["x"][:, :, 1] += 4  # the forget gate
    return inputs


OPS: Mapping[str, Op] = MappingProxyType(
    {
        "op/linear_attention": Op(_qkv, 2.0),
        "op/linear_attention/head": Op(lambda B, T: _qkv(B, T) | _head(B, T), 2.0),
        "op/linear_attention/key": Op(lambda B, T: _qkv(B, T) | _key(B, T), 2.0),
        "op/ssd": Op(_ssd, 2.0),
        "op/mlstm": Op(_mlstm, 2.0),
        "op/delta_rule": Op(lambda B, T: _qkv(B, T) | _beta(B, T), 2.0),
        "op/delta_rule/head": Op(lambda B, T: _qkv(B, T) | _beta(B, T) | _head(B, T), 2.0),
        "op/delta_rule/key": Op(lambda B, T: _qkv(B, T) | _beta(B, T) | _key(B, T), 2.0),
        "op/dplr": Op(_rwkv7, 20.0),
        "op/scan": Op(_scan, 5.0),
        "op/selective_scan": Op(_selective, 5.0),
        "op/slstm": Op(_slstm, SERIAL, SERIAL),
        "op/lstm": Op(lambda B, T: _cell(B, T, 4), SERIAL, SERIAL),
        "op/gru": Op(lambda B, T: _cell(B, T, 3) | {"bias": torch.randn(HEADS, VALUE)}, SERIAL, SERIAL),
        "op/attention": Op(_qkv, None),
    }
)


def kind(function: str) -> str:
    """`op`, `layer` or `decode`."""
    return function.split("/")[0]


def draw(function: str, batch: int, length: int, dim: int, vocab: int = 256) -> Tensors:
    """The inputs of a function, the same for every call, with a gradient for the output beside them."""
    torch.manual_seed(batch * 1_000_003 + length)
    if function.startswith("decode/model"):
        return {"tokens": torch.randint(vocab, (1, length))}
    if kind(function) == "decode":
        return {"tokens": torch.randn(1, length, dim)}
    if kind(function) == "layer":
        return {"x": torch.randn(batch, length, dim), "cotangent": torch.randn(batch, length, dim)}
    inputs = OPS[function].draw(batch, length)
    if "cotangent" in inputs:
        return inputs
    like = next(inputs[name] for name in ("v", "u", "x", "b") if name in inputs)
    return inputs | {"cotangent": torch.randn_like(like)}


def target(function: str, phase: str, note: str) -> float | None:
    """By what factor this library aims to be faster than a peer's `forward`, `training` or `decode`."""
    if phase == "decode":
        return DECODE if function not in ("decode/lstm", "decode/gru") else None
    if function == "op/attention":
        return None  # both sides are the same kernel of PyTorch
    if function in CELLS:
        return CELLS[function]
    if phase == "forward":
        return FORWARD
    if kind(function) == "layer":
        return LAYER
    return OPS[function].loop if "loop" in note else OPS[function].target

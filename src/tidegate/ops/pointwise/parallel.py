"""The same in plain PyTorch: any device and dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def elu_plus_one(x: Tensor) -> Tensor:
    return functional.elu(x) + 1


def log_sigmoid(x: Tensor, bias: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return scale * functional.logsigmoid(x.to(wide) + bias.to(wide))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def token_mix(x: Tensor, shifted: Tensor, mix: Tensor) -> list[Tensor]:
    change = shifted - x
    return [torch.addcmul(x, change, row) for row in mix]

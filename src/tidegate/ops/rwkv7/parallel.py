"""The same in plain PyTorch: any device and dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rwkv7_keys(k: Tensor, logits: Tensor, k_k: Tensor, k_a: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    a = logits.sigmoid()
    chosen = (k * k_k).to(torch.promote_types(k.dtype, torch.float32))
    # The floor of the norm stands inside the root, where its derivatives stay finite on padding.
    removed = chosen * torch.rsqrt(chosen.square().sum(-1, keepdim=True) + 1e-12)
    return k * (1 + (a - 1) * k_a), -removed, rate * a * removed


def rwkv7_output(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    o = functional.layer_norm(o, o.shape[-1:], eps=1e-5 * o.shape[-1])
    o = torch.addcmul(bias, o, weight)
    return (o + (r * k * bonus).sum(-1, keepdim=True) * v) * gate

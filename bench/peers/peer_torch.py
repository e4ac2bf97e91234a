"""PyTorch's own recurrent layers and fused attention."""

from __future__ import annotations

from typing import Any

import torch
from adapter import adapts, fill
from torch import nn

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@adapts("op/attention", "torch scaled_dot_product_attention")
def attention(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _translate(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}_l0": weights[part] for part in PARTS}


def _enter(name: str, kind: type[nn.Module]) -> None:
    @adapts(f"layer/{name}", f"torch.nn.{kind.__name__}")
    def layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
        module = kind(options["dim"], options["dim"], batch_first=True)
        fill(module, _translate(weights))
        return module, lambda x: module(x)[0], _translate

    @adapts(f"decode/{name}", f"torch.nn.{kind.__name__}")
    def decode(options: dict[str, Any], weights: dict[str, Any]) -> Any:
        module, _, _ = layer(options, weights)
        module.eval()
        state = None

        def step(token: torch.Tensor) -> torch.Tensor:
            nonlocal state
            y, state = module(token[:, None], state)
            return y[:, 0]

        return step


_enter("lstm", nn.LSTM)
_enter("gru", nn.GRU)

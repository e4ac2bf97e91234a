"""mambapy: the parallel scan and the Mamba block around it."""

from __future__ import annotations

from typing import Any

import torch
from adapter import adapts, fill
from mambapy.mamba import MambaBlock, MambaConfig
from mambapy.pscan import pscan


@adapts("op/scan", "mambapy pscan")
def scan(a: Any, b: Any) -> Any:
    # It wants (B, T, D, N); channels are independent, so any factoring of them is the same function.
    return pscan(a.unflatten(-1, (-1, 16)), b.unflatten(-1, (-1, 16))).flatten(-2)


@adapts("op/selective_scan", "mambapy MambaBlock.selective_scan")
def selective_scan(u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return MambaBlock.selective_scan(None, u, dt, a, b, c, d)


def translate(weights: dict[str, Any]) -> dict[str, Any]:
    """tidegate's `mamba` mixer by the names that mambapy and transformers share."""
    return {
        "in_proj.weight": torch.cat([weights["u_proj.weight"], weights["z_proj.weight"]]),
        "conv1d.weight": weights["convolution.weight"].unsqueeze(1),
        "conv1d.bias": weights["convolution.bias"],
        "x_proj.weight": weights["x_proj.weight"],
        "dt_proj.weight": weights["dt_proj.weight"],
        "dt_proj.bias": weights["dt_bias"],
        "A_log": weights["log_a"],
        "D": weights["d"],
        "out_proj.weight": weights["o_proj.weight"],
    }


@adapts("layer/mamba", "mambapy MambaBlock")
def layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = MambaBlock(MambaConfig(d_model=options["dim"], n_layers=1))
    fill(module, translate(weights))
    return module, module, translate

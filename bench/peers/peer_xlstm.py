"""xlstm: the sLSTM on its path for a CPU, called as its documentation and signatures say (its source was not read)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from adapter import adapts, fill
from torch.func import functional_call
from xlstm import sLSTMLayer, sLSTMLayerConfig
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

CPU = {"backend": "vanilla", "dtype": "float32"}


@lru_cache(1)
def _cell(heads: int, head_dim: int) -> Any:
    return sLSTMCell(sLSTMCellConfig(hidden_size=heads * head_dim, num_heads=heads, **CPU))


def _matrices(matrices: Any) -> Any:
    """(gates, heads, out, in) -> (heads, gates * out, in)."""
    return matrices.transpose(0, 1).flatten(1, 2)


@adapts("op/slstm", "xlstm sLSTMCell", "loop")
def slstm(x: Any, matrices: Any) -> Any:
    own = {"_recurrent_kernel_": _matrices(matrices), "_bias_": x.new_zeros(matrices[..., 0].numel())}
    return functional_call(_cell(*matrices.shape[1:3]), own, (x.flatten(2),))[0].transpose(1, 2)


def translate(weights: dict[str, Any]) -> dict[str, Any]:
    heads, head_dim = 4, weights["weight_hh"].shape[1]
    inputs = weights["weight_ih"].view(4, heads, head_dim, head_dim)
    return {
        "conv1d.conv.weight": weights["convolution.weight"].unsqueeze(1),
        "conv1d.conv.bias": weights["convolution.bias"],
        **{f"{gate}gate.weight": inputs[index] for index, gate in enumerate("fizo")},  # the cell takes `fgate` as i
        "slstm_cell._recurrent_kernel_": _matrices(weights["weight_hh"].view(4, heads, head_dim, head_dim)),
        "slstm_cell._bias_": weights["bias_ih"],
        "group_norm.weight": weights["norm_weight"] - 1,  # it multiplies by 1 + weight
    }


@adapts("layer/slstm", "xlstm sLSTMLayer", "loop")
def layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = sLSTMLayer(sLSTMLayerConfig(embedding_dim=options["dim"], num_heads=4, **CPU))
    fill(module, translate(weights))
    return module, module, translate

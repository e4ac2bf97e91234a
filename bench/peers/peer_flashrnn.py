"""flashrnn: its function on the paths for a CPU, called as its documentation says (its source was not read)."""

from __future__ import annotations

from typing import Any

import torch
from adapter import adapts
from flashrnn import flashrnn


def _enter(function: str, backend: str) -> None:
    @adapts(f"op/{function}", f"flashrnn {backend}", "loop")
    def cell(x: Any, matrices: Any) -> Any:
        biases = torch.zeros_like(matrices[..., 0])
        return flashrnn(x, matrices, biases, function=function, backend=backend, dtype="float32")[0][0]


# vanilla_fwbw has a backward of its own, and no GRU.
for name in ("slstm", "lstm"):
    for path in ("vanilla", "vanilla_fwbw"):
        _enter(name, path)


@adapts("op/gru", "flashrnn vanilla", "loop")
def gru(x: Any, matrices: Any, bias: Any) -> Any:
    # Its four gates: the state's part of the candidate, r, z, the input's part of the candidate. All have a bias, the
    # first no input, the last no matrix.
    biases = torch.cat([bias[None], torch.zeros_like(matrices[..., 0])])
    return flashrnn(x, matrices.roll(1, 0), biases, function="gru", backend="vanilla", dtype="float32")[0][0]

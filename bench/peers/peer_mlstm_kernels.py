"""mlstm_kernels: the entry points it names for a CPU, called as its documentation says (its source was not read)."""

from __future__ import annotations

from typing import Any

from adapter import adapts
from mlstm_kernels.torch import get_mlstm_kernel


def _enter(function: str, kernel: str) -> None:
    run = get_mlstm_kernel(kernel)

    @adapts(function, f"mlstm_kernels {kernel}")
    def mlstm(q: Any, k: Any, v: Any, i: Any, f: Any) -> Any:
        q, k, v, i, f = (x.transpose(1, 2).contiguous() for x in (q, k, v, i, f))
        return run(q=q, k=k, v=v, i=i, f=f).transpose(1, 2)


_enter("op/mlstm", "chunkwise--native_custbw")
_enter("op/mlstm", "chunkwise--native_autograd")

"""What mixers with queries, keys and values share: one projection, and a short convolution on what comes out of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import ShortConvolution
from tidegate.segments import Segments
from tidegate.state import State


class QKVMixer(Mixer):
    """A mixer that opens with `q, k, v = split(silu(conv(x W)))` and keeps a matrix per head.

    `_build_qkv` sets the parts up; `_qkv` gives queries, keys and values side by side (B, T, sum of widths) and the
    new state, to which the mixer adds its memory. Without convolution the SiLU stays where `always_silu` says so.

    State: convolution (conv_width - 1, sum of widths), if there is one; memory, of `memory_shape`.
    """

    always_silu = False
    conv_width: int | None
    memory_shape: tuple[int, int, int]

    def _build_qkv(self, widths: tuple[int, int, int], factory: dict[str, Any]) -> None:
        self.widths, total = widths, sum(widths)
        self.qkv_proj = nn.Linear(self.dim, total, bias=False, **factory)
        self.convolution = ShortConvolution(total, self.conv_width, **factory) if self.conv_width else None

    def state_spec(self) -> dict[str, Any]:
        memory = {"memory": self.memory_shape}
        if not self.conv_width:
            return memory
        return {"convolution": ((self.conv_width - 1, sum(self.widths)), "input"), **memory}

    def _qkv(
        self, x: Tensor, state: State, segments: Segments | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        qkv, new = self.qkv_proj(x), {}
        if self.convolution is not None:
            qkv, new["convolution"] = self.convolution(qkv, state["convolution"], segments)
        elif self.always_silu:
            qkv = nn.functional.silu(qkv)
        q, k, v = qkv.split(list(self.widths), -1)
        return (q, k, v), new

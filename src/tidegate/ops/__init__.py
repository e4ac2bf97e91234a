"""Recurrences as pure functions on tensors: state in, state out, gradients through both."""

from typing import TYPE_CHECKING, Any

from tidegate.ops.additive_decay import additive_decay
from tidegate.ops.attention import attention
from tidegate.ops.convolution import short_convolution
from tidegate.ops.delta import delta_rule, dplr
from tidegate.ops.dense_ssm import dense_ssm
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.ops.gated_norm import gated_norm
from tidegate.ops.linear_attention import linear_attention
from tidegate.ops.long_convolution import long_convolution, two_sided_convolution
from tidegate.ops.mlstm import mlstm
from tidegate.ops.scan import scan
from tidegate.ops.selective_scan import selective_scan
from tidegate.ops.slot_scores import slot_scores
from tidegate.ops.sru import sru

if TYPE_CHECKING:
    from tidegate.ops.cell import Cell

__all__ = [
    "Cell",
    "additive_decay",
    "attention",
    "delta_rule",
    "dense_ssm",
    "diagonal_ssm",
    "dplr",
    "gated_norm",
    "linear_attention",
    "long_convolution",
    "mlstm",
    "scan",
    "selective_scan",
    "short_convolution",
    "slot_scores",
    "sru",
    "two_sided_convolution",
]


def __getattr__(name: str) -> Any:
    if name == "Cell":  # imports SymPy, for which who wants another op should not wait
        from tidegate.ops.cell import Cell

        return Cell
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Recurrences as pure functions on tensors: state in, state out, gradients through both."""

from tidegate.ops.attention import attention
from tidegate.ops.convolution import short_convolution
from tidegate.ops.delta import delta_rule, dplr
from tidegate.ops.linear_attention import linear_attention
from tidegate.ops.scan import scan

__all__ = ["attention", "delta_rule", "dplr", "linear_attention", "scan", "short_convolution"]

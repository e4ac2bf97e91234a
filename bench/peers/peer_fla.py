"""flash-linear-attention: the plain PyTorch references that its GPU kernels are tested against."""

from __future__ import annotations

from typing import Any

from adapter import adapts
from fla.ops.delta_rule.naive import delta_rule_chunkwise
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise, dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.kda.naive import naive_chunk_kda
from fla.ops.linear_attn.naive import naive_chunk_linear_attn
from fla.ops.simple_gla.naive import naive_chunk_simple_gla

# All of them scale the query by K ** -0.5, as tidegate's side does here.


def _heads_first(*tensors: Any) -> list[Any]:
    return [x.transpose(1, 2) for x in tensors]


@adapts("op/linear_attention", "fla naive_chunk_linear_attn")
def linear_attention(q: Any, k: Any, v: Any) -> Any:
    return naive_chunk_linear_attn(q, k, v)


@adapts("op/linear_attention/head", "fla naive_chunk_simple_gla")
def simple_gla(q: Any, k: Any, v: Any, log_decay: Any) -> Any:
    return naive_chunk_simple_gla(q, k, v, log_decay)[0]


@adapts("op/linear_attention/key", "fla naive_recurrent_gla", "loop")
def gla(q: Any, k: Any, v: Any, log_decay: Any) -> Any:
    return naive_recurrent_gla(q, k, v, log_decay)[0]


@adapts("op/delta_rule", "fla delta_rule_chunkwise")
def delta_rule(q: Any, k: Any, v: Any, beta: Any) -> Any:
    return delta_rule_chunkwise(*_heads_first(q, k, v, beta))[0].transpose(1, 2)


@adapts("op/delta_rule/head", "fla naive_chunk_gated_delta_rule")
def gated_delta_rule(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
    return naive_chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]


@adapts("op/delta_rule/key", "fla naive_chunk_kda")
def kda(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
    return naive_chunk_kda(q, k, v, log_decay, beta)[0]


@adapts("op/dplr", "fla dplr_recurrence", "loop")
def rwkv7(q: Any, k: Any, v: Any, a: Any, b: Any, log_decay: Any) -> Any:
    return dplr_recurrence(*_heads_first(q, k, v, a, b, log_decay))[0].transpose(1, 2)


@adapts("op/dplr", "fla dplr_chunkwise")
def rwkv7_chunks(q: Any, k: Any, v: Any, a: Any, b: Any, log_decay: Any) -> Any:
    return dplr_chunkwise(*_heads_first(q, k, v, a, b, log_decay))[0].transpose(1, 2)


@adapts("op/scan", "fla naive_recurrent_hgrn", "loop")
def hgrn(a: Any, b: Any) -> Any:
    return naive_recurrent_hgrn(b, a.log())[0]

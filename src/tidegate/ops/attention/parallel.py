"""Attention through torch's fused kernel: in one piece where it can, in blocks where a mask would grow as T x T.

What that kernel cannot do, other weights than a softmax's or a bias, is plain products over the same blocks.

Every token has a place on one line of integers: its document times `APART`, plus its position in the document. A query
at place a sees a key at place b exactly if 0 <= a - b < span, where span is the window, or anything below `APART` for
full attention. So one number per token stands for documents, causality and window together. Padding and empty slots
share one place far off: no token sees them, and padded queries see each other, whose values are zero, instead of
nothing, which would be a softmax over the empty set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tidegate.backend import mapped
from tidegate.ops.attention.weights import APART, Rule, Sees, by_definition
from tidegate.ops.slots import append
from tidegate.segments import Segments

Cache = tuple[Tensor, Tensor, Tensor]
_NOWHERE = 2**62
_QUERIES = 512  # queries per masked call of full attention: bounds a mask's memory by this times the keys
_GROUP = 4096  # tokens per call of windowed attention: copies of keys and values stay in the cache and the allocator


def parallel(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Cache | None, segments: Segments | None
) -> tuple[Tensor, Cache]:
    """`ops.attention` after its checks: one fused call, masked blocks of queries, or blocks along a window."""
    window, exporting = rule.window, torch.compiler.is_exporting()
    if window is None and state is not None and not exporting and state[0].shape[1] == 0:
        state = None
    past, length = (None, None) if state is None else (state[:2], state[2])
    (new_keys, new_values), new_length = append((k, v), past, length, segments, window)
    new_state = new_keys, new_values, new_length
    # Where keys and values differ in width, the fused kernel is none, and a whole sequence at once would be T x T.
    if window is None and state is None and segments is None and rule.fused and q.shape[-1] == v.shape[-1]:
        return _attend(q, k, v, None, rule), new_state

    place, past_place = _places(q, window, state, segments)
    if window is None:
        keys, values, key_place = k, v, place
        if state is not None and segments is None:  # the new state holds past and present: nothing is copied twice
            keys, values, length = new_state
            slot = torch.arange(keys.shape[1], device=q.device)[None]
            key_place = torch.where(slot < length[:, None], slot, _NOWHERE)
        elif state is not None and past_place is not None:
            keys, values = torch.cat([state[0], k], dim=1), torch.cat([state[1], v], dim=1)
            key_place = torch.cat([past_place, place], dim=1)
        return _masked(q, keys, values, place, key_place, APART // 2, rule), new_state

    def windowed(q: Tensor, k: Tensor, v: Tensor, place: Tensor, regular: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return _windowed_traced(q, k, v, place, state, past_place, window, rule)
        return _windowed(q, k, v, place, state, past_place, window, rule, regular=regular)

    if segments is None:
        return windowed(q, k, v, place, True), new_state
    # Padding may stand anywhere, and a window counts real tokens: close the gaps, attend, and open them again.
    batch, time = segments.shape
    order = segments.valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    back = (segments.valid.cumsum(1) - 1).clamp(min=0)
    row = torch.arange(batch, device=q.device)[:, None] * time
    q, k, v, place = (_rows(x, row + order) for x in (q, k, v, place))
    o = windowed(q, k, v, place, False)
    return _rows(o, row + back), new_state


# -- who sees whom -----------------------------------------------------------------------------------------------------
def _places(
    q: Tensor, window: int | None, state: Cache | None, segments: Segments | None
) -> tuple[Tensor, Tensor | None]:
    """Places of the new tokens (B or 1, T) and of the slots of the past (B, L)."""
    offset = None if state is None else state[2]
    if segments is None:
        place = torch.arange(q.shape[1], device=q.device)[None]
        place = place if offset is None else place + offset[:, None]
    else:
        place = segments.documents * APART + segments.positions(offset)
        place = torch.where(segments.valid, place, _NOWHERE)
    if state is None or offset is None:
        return place, None
    slot = torch.arange(state[0].shape[1], device=q.device)[None]
    newest = offset[:, None] - 1
    # A slot holds the newest position that maps to it; before the ring is full that is the slot's own number.
    held = slot if window is None else newest - (newest - slot) % window
    return place, torch.where((held >= 0) & (held <= newest), held, _NOWHERE)


# -- pieces ------------------------------------------------------------------------------------------------------------
def _masked(q: Tensor, k: Tensor, v: Tensor, place: Tensor, key_place: Tensor, span: int, rule: Rule) -> Tensor:
    """Masked attention by blocks of queries; the last keys are the queries' own tokens."""
    if torch.compiler.is_compiling() or q.shape[1] <= _QUERIES:  # a traced program must not fix the number of blocks
        return _attend(q, k, v, Sees(place, key_place, span), rule)
    before = k.shape[1] - q.shape[1]
    pieces, until = [], before
    for queries, places in zip(q.split(_QUERIES, dim=1), place.split(_QUERIES, dim=1), strict=True):
        until += queries.shape[1]
        sees = Sees(places, key_place[:, :until], span)
        pieces.append(_attend(queries, k[:, :until], v[:, :until], sees, rule))
    return torch.cat(pieces, dim=1)


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    state: Cache | None,
    past_place: Tensor | None,
    window: int,
    rule: Rule,
    *,
    regular: bool,
) -> Tensor:
    """Blocks of `window` queries against their own and the previous block of keys: O(T * window) in all.

    `regular` says that there is neither padding nor a second document, so that all blocks share one mask.
    """
    batch, time = q.shape[:2]
    # Pieces: the first block, groups of whole blocks, the rest. `split` gives each its gradient once; slices of the
    # whole would each add a gradient as long as the sequence, O(T^2) in all.
    if time <= window:
        sizes = [time]
    else:
        count, group = time // window, max(1, _GROUP // (window * max(1, batch)))
        sizes = [window, *(min(group, count - n) * window for n in range(1, count, group)), time % window]
        sizes = [size for size in sizes if size]
    queries, keys, values, places = (x.split(sizes, dim=1) for x in (q, k, v, place))

    pieces = []
    order = torch.arange(2 * window, device=q.device)[None]
    for n, size in enumerate(sizes):
        if n == 0:  # sees itself and the past
            near, near_values, near_place = keys[0], values[0], places[0]
            if state is not None and past_place is not None:
                near = torch.cat([state[0], near], dim=1)
                near_values = torch.cat([state[1], near_values], dim=1)
                near_place = torch.cat([past_place, near_place], dim=1)
            alone = state is None and regular
            mask = None if alone else Sees(places[0], near_place, window)
            pieces.append(_attend(queries[0], near, near_values, mask, rule))
            continue

        def near_of(parts: tuple[Tensor, ...], n: int = n) -> Tensor:
            return torch.cat([parts[n - 1][:, -window:], parts[n]], dim=1)

        if size % window:  # the rest
            mask = Sees(places[n], near_of(places), window)
            pieces.append(_attend(queries[n], near_of(keys), near_of(values), mask, rule))
            continue

        def blocks(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, window)).flatten(0, 1)

        def pairs(parts: tuple[Tensor, ...], n: int = n) -> Tensor:
            before = torch.cat([parts[n - 1][:, -window:], parts[n][:, :-window]], dim=1)
            return torch.cat([blocks(before), blocks(parts[n])], dim=1)

        mask = Sees(order[:, window:], order, window) if regular else Sees(blocks(places[n]), pairs(places), window)
        o = _attend(blocks(queries[n]), pairs(keys), pairs(values), mask, rule)
        pieces.append(o.unflatten(0, (batch, size // window)).flatten(1, 2))
    return torch.cat(pieces, dim=1)


def _windowed_traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    state: Cache | None,
    past_place: Tensor | None,
    window: int,
    rule: Rule,
) -> Tensor:
    """The same without a branch on the length, so that one compiled graph takes any: all blocks alike, the last filled
    up. (It always is, for a graph would know a length that fills all blocks as a case of its own.)"""
    batch, time = q.shape[:2]
    count = time // window + 1
    fill = count * window - time
    if state is None or past_place is None:
        past_place = torch.full((batch, window), _NOWHERE, device=q.device)
        past_k, past_v = k.new_zeros(batch, window, *k.shape[2:]), v.new_zeros(batch, window, *v.shape[2:])
    else:
        past_k, past_v = state[:2]

    def blocks(x: Tensor) -> Tensor:
        return x.reshape(batch * count, window, *x.shape[2:])

    def pairs(past: Tensor, x: Tensor) -> Tensor:
        return torch.cat([blocks(torch.cat([past, x], dim=1)[:, : count * window]), blocks(x)], dim=1)

    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, fill)) for x in (q, k, v))
    place = torch.nn.functional.pad(place.expand(batch, time), (0, fill), value=_NOWHERE)
    sees = Sees(blocks(place), pairs(past_place, place), window)
    o = _attend(blocks(q), pairs(past_k, k), pairs(past_v, v), sees, rule)
    return o.reshape(batch, count * window, *o.shape[2:])[:, :time]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) reordered along time by flat row numbers (B, T)."""
    return (
        x.expand(index.shape[0], *x.shape[1:]).flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    )


# -- the kernel --------------------------------------------------------------------------------------------------------
Mask = Sees | None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, rule: Rule) -> Tensor:
    """q (N, T, H, D), k (N, S, G, D), v (N, S, G, V); without a mask, causal with S = T."""
    if torch.compiler.is_compiling():
        return _form(rule)(q, k, v, mask, rule)
    if mapped():
        return by_definition(q, k, v, mask, rule)
    inputs = (q, k, v) if rule.bias is None else (q, k, v, rule.bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Attend.apply(q, k, v, rule.bias, mask, rule)
    return _form(rule)(q, k, v, mask, rule)


def _form(rule: Rule) -> Callable[..., Tensor]:
    return _fused if rule.fused else by_definition


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, rule: Rule) -> Tensor:
    heads, groups, scale = q.shape[2], k.shape[2], rule.scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None:
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups)
    elif not torch.compiler.is_exporting() and q.shape[2] == 1:
        # One new token: the heads that share a key-value head are its queries, and keys are read once.
        o = scaled_dot_product_attention(q.unflatten(1, (groups, -1))[..., 0, :], k, v, attn_mask=mask(), scale=scale)
        return o.flatten(1, 2)[:, None]
    else:
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask(), scale=scale, enable_gqa=heads != groups)
    return o.transpose(1, 2)


class _Attend(torch.autograd.Function):
    """A block, with two things added: a second derivative, and masks and weights that are rebuilt, not stored."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, rule: Rule) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.mask, ctx.rule, ctx.graph = mask, rule, None
        if mask is not None or not rule.fused:
            return _form(rule)(q, k, v, mask, rule)
        ctx.graph = _graph([q, k, v, bias], mask, rule)
        return ctx.graph[1].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = inputs = ctx.saved_tensors
        rule = ctx.rule
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            o = by_definition(q, k, v, ctx.mask, rule._replace(bias=bias))
            given = iter(torch.autograd.grad(o, wanted, grads, create_graph=True))
            return (*(next(given) if x is not None and x.requires_grad else None for x in inputs), None, None)
        # Without a mask the forward pass kept the kernel's own graph; it serves once, a second pass builds it anew.
        leaves, o = ctx.graph or _graph(inputs, ctx.mask, rule)
        ctx.graph = None
        found = torch.autograd.grad(o, leaves, grads)
        # The kernel weighs scores anew against a stored log-sum. Beyond 1e8, where neighbouring float32 numbers lie
        # more than one apart, that can overflow; the definition cannot. Looking is free only on the CPU.
        if rule.fused and q.device.type == "cpu" and not all(x.sum().isfinite() for x in found):
            leaves, o = _graph(inputs, ctx.mask, rule, by_definition)
            found = torch.autograd.grad(o, leaves, grads)
        return (*found, *[None] * (6 - len(found)))


def _graph(
    inputs: Sequence[Tensor | None], mask: Mask, rule: Rule, form: Callable[..., Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs if x is not None]
        q, k, v, bias = (*leaves, None)[:4]
        return leaves, (form or _form(rule))(q, k, v, mask, rule._replace(bias=bias))

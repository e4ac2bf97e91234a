"""Generators of recall tasks: endless, exact, a pure function of the random generator handed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from tidegate.tasks.targets import IGNORE, check_sizes

RESET = 0  # the token that begins a segment


def segment_recall(
    batch: int,
    generator: Generator,
    *,
    length: int = 128,
    keys: int = 12,
    values: int = 12,
    pairs: Sequence[int] = (4, 8, 24),
) -> tuple[Tensor, Tensor]:
    """Bindings that hold for one segment only: a model must keep them inside it and drop them at its end.

    A row is a concatenation of segments: RESET, then a number drawn from `pairs` of tokens "key value". Within a
    segment a key always has the same value, in the next one a new one. Where a key returns in its segment, the value
    that follows is a target.

    Returns ids and targets, both (batch, length). Tokens: RESET is 0, keys 1 ..., values after the keys; a target
    stands on the key and is the value's token, IGNORE elsewhere.

    >>> ids, targets = segment_recall(1, torch.Generator().manual_seed(0), length=9, keys=2, values=3, pairs=[3])
    >>> ids.tolist()
    [[0, 1, 5, 2, 3, 2, 3, 0, 2]]
    >>> targets.tolist()
    [[-100, -100, -100, -100, -100, 3, -100, -100, -100]]
    """
    check_sizes(batch=batch, length=length, keys=keys, values=values, pairs=min(pairs, default=0))
    most = length // (1 + 2 * min(pairs)) + 1  # segments in a row of shortest ones
    draw = torch.randint(len(pairs), (batch, most), generator=generator)
    ends = (1 + 2 * torch.tensor(list(pairs))[draw]).cumsum(1)
    time = torch.arange(length).expand(batch, length).contiguous()
    segment = torch.searchsorted(ends, time, right=True)
    inside = time - torch.nn.functional.pad(ends, (1, 0)).gather(1, segment)  # 0 RESET, odd a key, even a value

    key = torch.randint(keys, (batch, length), generator=generator)
    book = torch.randint(values, (batch, most, keys), generator=generator)  # the value of each key, by segment
    key = torch.where(inside % 2 == 1, key, key.roll(1, 1))  # a value belongs to the key before it
    value = 1 + keys + book.flatten(1).gather(1, segment * keys + key)
    ids = torch.where(inside == 0, RESET, torch.where(inside % 2 == 1, 1 + key, value))

    is_key = inside % 2 == 1
    binding = torch.where(is_key, segment * keys + key, -1 - time)  # equal for equal keys of one segment only
    again = (binding[:, :, None] == binding[:, None, :]).tril(-1).any(-1)
    return ids, torch.where(again & is_key, value, IGNORE)


def one_token_pairs(
    batch: int, generator: Generator, *, keys: int = 64, values: int = 16, stored: int = 32, asked: int = 32
) -> tuple[Tensor, Tensor]:
    """One binding per token, then questions: how many bindings fit into a state.

    The first `stored` tokens show different keys, each with a value; the next `asked` tokens show keys out of those,
    each at most once, with the mark `values` in the value's place.

    Returns pairs (batch, stored + asked, 2), of key and value, and targets (batch, stored + asked): the value of the
    key asked for, IGNORE on the tokens that store.

    >>> pairs, targets = one_token_pairs(1, torch.Generator().manual_seed(0), keys=9, values=4, stored=3, asked=2)
    >>> pairs.tolist()
    [[[2, 3], [3, 1], [4, 2], [2, 4], [3, 4]]]
    >>> targets.tolist()
    [[-100, -100, -100, 3, 1]]
    """
    check_sizes(batch=batch, keys=keys, values=values, stored=stored, asked=asked)
    if not asked <= stored <= keys:
        raise ValueError(f"asked, stored, keys: seen {asked}, {stored}, {keys}, wanted asked <= stored <= keys")
    shown = torch.rand(batch, keys, generator=generator).argsort(1)[:, :stored]
    value = torch.randint(values, (batch, stored), generator=generator)
    question = torch.rand(batch, stored, generator=generator).argsort(1)[:, :asked]
    mark = torch.full((batch, asked), values)
    both = torch.stack([torch.cat([shown, shown.gather(1, question)], 1), torch.cat([value, mark], 1)], -1)
    return both, torch.cat([torch.full((batch, stored), IGNORE), value.gather(1, question)], 1)

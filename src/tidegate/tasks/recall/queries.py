"""Recall of pairs that arrive as two tokens, and are asked for afterwards."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tidegate.tasks.randomness import distinct
from tidegate.tasks.targets import IGNORE, check_sizes, unscored


def mqar(
    batch: int,
    generator: Generator,
    *,
    vocab_size: int = 8192,
    length: int = 64,
    pairs: int = 4,
    power: float = 0.01,
    random_non_queries: bool = True,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs first, each key once more later.

    The first 2 pairs tokens are "key value", all different. The rest is cut into slots of two tokens; `pairs` of them
    begin with one of the keys, slot g (1, 2, ...) drawn in proportion to g^(power - 1), so that early questions are
    likelier. All other positions are random tokens of the whole vocabulary, or 0 with `random_non_queries=False`.

    Returns ids and targets, both (batch, length). Tokens: 0 nothing, keys 1 ... vocab_size // 2 - 1, values from there;
    a target stands on the key asked for and is the value's token, IGNORE elsewhere.

    >>> ids, targets = mqar(1, torch.Generator().manual_seed(0), vocab_size=8, length=8, pairs=2,
    ...                     random_non_queries=False)
    >>> ids.tolist(), targets.tolist()
    ([[3, 7, 2, 5, 3, 0, 2, 0]], [[-100, -100, -100, -100, 7, -100, 5, -100]])
    """
    check_sizes(batch=batch, vocab_size=vocab_size, length=length, pairs=pairs)
    half = vocab_size // 2
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length: seen {length}, wanted an even number of at least 4 pairs = {4 * pairs}")
    if half - 1 < pairs:
        raise ValueError(f"vocab_size: seen {vocab_size}, wanted at least 2 (pairs + 1) = {2 * (pairs + 1)}")
    key = 1 + distinct(batch, half - 1, pairs, generator)
    value = half + distinct(batch, vocab_size - half, pairs, generator)
    slots = length // 2 - pairs
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1)
    asked = 2 * (pairs + distinct(batch, slots, pairs, generator, weights))

    ids = torch.cat([torch.stack([key, value], -1).flatten(1), torch.zeros(batch, 2 * slots, dtype=torch.long)], 1)
    ids = ids.scatter(1, asked, key)
    if random_non_queries:
        ids = torch.where(ids == 0, torch.randint(vocab_size, ids.shape, generator=generator), ids)
    return ids, unscored(batch, length).scatter(1, asked, value)


def associative_recall(
    batch: int,
    generator: Generator,
    *,
    keys: int = 6,
    values: int = 6,
    pairs: int = 12,
    missing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pairs "key value" with repetition, a mark, and one key: which value belongs to it? (H3, arXiv 2212.14052.)

    Every row has a map from keys to values of its own. The key asked for is drawn evenly from those that occurred, or
    with `missing=True` from all; the answer to one that did not occur is the mark.

    Returns ids and targets, both (batch, 2 pairs + 2). Tokens: keys 0 ... keys - 1, then values, then the mark
    `keys + values`; the only target stands on the last position and is the value's token.

    >>> ids, targets = associative_recall(1, torch.Generator().manual_seed(0), keys=2, values=3, pairs=3)
    >>> ids.tolist(), targets.tolist()
    ([[1, 2, 0, 4, 1, 2, 5, 0]], [[-100, -100, -100, -100, -100, -100, -100, 4]])
    """
    check_sizes(batch=batch, keys=keys, values=values, pairs=pairs)
    mark = keys + values
    book = keys + torch.randint(values, (batch, keys), generator=generator)
    key = torch.randint(keys, (batch, pairs), generator=generator)
    shown = torch.zeros(batch, keys, dtype=torch.bool).scatter(1, key, True)
    chance = torch.rand(batch, keys, generator=generator)
    asked = (chance if missing else torch.where(shown, chance, -1)).argmax(1, keepdim=True)
    answer = torch.where(shown, book, mark).gather(1, asked)

    story = torch.stack([key, book.gather(1, key)], -1).flatten(1)
    ids = torch.cat([story, torch.full((batch, 1), mark), asked], 1)
    return ids, torch.cat([unscored(batch, 2 * pairs + 1), answer], 1)


def pairs_in_noise(
    batch: int,
    generator: Generator,
    *,
    keys: int = 8,
    values: int = 8,
    noise: int = 8,
    pairs: int = 4,
    story: int = 64,
    questions: int = 16,
) -> tuple[Tensor, Tensor]:
    """A few pairs lost in noise, and their keys asked for at the end (SeqBoat's laptop test, arXiv 2306.11197).

    Out of the first `story` positions, `pairs` of the slots (0, 1), (2, 3), ... hold a pair "key value" of different
    keys; each key returns once among the last `questions` positions; everything else is noise.

    Returns ids and targets, both (batch, story + questions). Tokens: keys 0 ... keys - 1, then values, then noise, so
    `ids < keys + values` says which positions matter: what an oracle that routes tokens is to keep. A target stands on
    a key's return and is the value's token.

    >>> ids, targets = pairs_in_noise(1, torch.Generator().manual_seed(0), keys=2, values=2, noise=2, pairs=1,
    ...                               story=4, questions=2)
    >>> ids.tolist(), targets.tolist()
    ([[1, 3, 4, 4, 1, 4]], [[-100, -100, -100, -100, 3, -100]])
    >>> (ids < 4).tolist()
    [[True, True, False, False, True, False]]
    """
    check_sizes(batch=batch, keys=keys, values=values, noise=noise, pairs=pairs, story=story, questions=questions)
    if pairs > min(keys, story // 2, questions):
        raise ValueError(
            f"pairs: seen {pairs}, wanted at most keys = {keys}, story // 2 = {story // 2} and questions = {questions}"
        )
    key = distinct(batch, keys, pairs, generator)
    value = keys + torch.randint(values, (batch, pairs), generator=generator)
    slot = 2 * distinct(batch, story // 2, pairs, generator)
    asked = story + distinct(batch, questions, pairs, generator)
    ids = keys + values + torch.randint(noise, (batch, story + questions), generator=generator)
    ids = ids.scatter(1, slot, key).scatter(1, slot + 1, value).scatter(1, asked, key)
    return ids, torch.full_like(ids, IGNORE).scatter(1, asked, value)

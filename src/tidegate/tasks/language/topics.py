"""A megabyte of English that every Python has: its own help texts, for experiments that are over in a minute."""

from __future__ import annotations

import torch
from torch import Tensor


def topics() -> tuple[Tensor, Tensor]:
    """Help texts of Python itself as bytes: nine tenths to learn, the last tenth to score."""
    from pydoc_data.topics import topics as texts

    content = torch.frombuffer(bytearray("\n\n".join(texts.values()).encode()), dtype=torch.uint8).long()
    cut = len(content) * 9 // 10
    return content[:cut], content[cut:]


def windows(content: Tensor, begins: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(rows, length) bytes from each of `begins` on, and the byte after each of them.

    >>> [part.tolist() for part in windows(torch.arange(9), torch.tensor([0, 4]), 3)]
    [[[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]]]
    """
    rows = content[begins[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def random_windows(content: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` windows that begin anywhere."""
    return windows(content, torch.randint(len(content) - length, (batch,), generator=generator), length)


def all_windows(content: Tensor, length: int, batch: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The whole text in windows laid end to end, in batches of at most `batch`."""
    parts = windows(content, torch.arange(0, len(content) - length - 1, length), length)
    return list(zip(*(part.split(batch) for part in parts), strict=True))

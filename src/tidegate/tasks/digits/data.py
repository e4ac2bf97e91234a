"""The images that come with scikit-learn, as sequences of 64 pixels in a fixed order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from tidegate.tasks.targets import check_sizes

HELD_OUT = 360  # of 1,797
_SPLIT_SEED = 0


class Digits(NamedTuple):
    """Pixels (N, 64, 1) between 0 and 1, and labels (N,) 0 ... 9, to learn from and to be scored with."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def load_digits(*, permutation: int | None = 0) -> Digits:
    """All digits: 1,437 to learn and 360 held out, split at random but always alike.

    The pixels come in an order drawn from the seed `permutation`, or row by row with None.

    Raises ImportError, saying what to install, without scikit-learn.

    >>> load_digits().train[0].shape, load_digits().held_out[1].shape
    (torch.Size([1437, 64, 1]), torch.Size([360]))
    """
    pixels, labels = _images()
    if permutation is not None:
        pixels = pixels[:, torch.randperm(64, generator=Generator().manual_seed(permutation))]
    order = torch.randperm(len(labels), generator=Generator().manual_seed(_SPLIT_SEED))
    learnt, held = order[HELD_OUT:], order[:HELD_OUT]
    return Digits((pixels[learnt], labels[learnt]), (pixels[held], labels[held]))


def digits(batch: int, generator: Generator, *, permutation: int | None = 0) -> tuple[Tensor, Tensor]:
    """Digits to learn from, drawn with replacement: pixels (batch, 64, 1) and labels (batch,).

    >>> pixels, labels = digits(2, torch.Generator().manual_seed(0))
    >>> pixels.shape, labels.shape
    (torch.Size([2, 64, 1]), torch.Size([2]))
    """
    check_sizes(batch=batch)
    pixels, labels = load_digits(permutation=permutation).train
    chosen = torch.randint(len(labels), (batch,), generator=generator)
    return pixels[chosen], labels[chosen]


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64, 1) and labels (1797,) in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install 'tidegate[data]'"
        ) from None
    pixels, labels = load(return_X_y=True)
    return torch.from_numpy(pixels).float()[..., None] / 16, torch.from_numpy(labels).long()

"""Chunks of tokens within which decays can be split in two factors, and the elementwise passes kernels share.

A chunk ends before a document start, before padding, and before the decay inside it would exceed e^STRONGEST. Its
cumulative log decay G then lies in [STRONGEST, 0], so that e^G and e^-G are exact in float32, whatever the gates. Where
the first token's decay alone exceeds that, it is left out of G and has to be applied to the state beforehand.
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import jit_inside, wide_vectors
from tidegate.ops.passes import elementwise

CHUNK = 16
STRONGEST = np.float32(-40.0)


# -- passes ------------------------------------------------------------------------------------------------------------
def _zero():
    return 0.0


def _one():
    return 1.0


def _product(x, y):
    return x * y


def _exp(x):
    return x.exp()


def _exp_and_inverse(x):
    return x.exp_and_inverse()


def _cumulate(total, x):
    return total + x, total + x


clear, fill_ones, multiply, exp = elementwise(_zero), elementwise(_one), elementwise(_product), elementwise(_exp)
exp_and_inverse, cumulate = elementwise(_exp_and_inverse), elementwise(_cumulate, carry=True)
dot = elementwise(_product, total=True)


# -- chunks ------------------------------------------------------------------------------------------------------------
@jit_inside
def too_strong(x, at, channels):
    """Whether any of these logs is below what a chunk may hold."""
    wide_vectors()
    strong = 0
    for c in range(channels):
        strong += x[at + c] < STRONGEST
    return strong > 0


@jit_inside
def cumulate_logs(x, logs, row, g, begin, stride, channels, size, strong):
    """x[logs:] = the cumulative log decay of a chunk's tokens; leaves out the first one's if it is too strong."""
    carry = logs + CHUNK * row
    skip = 1 if strong else 0
    clear(1, channels, ((x, carry, 0),), ())
    clear(skip, channels, ((x, logs, 0),), ())
    cumulate(size - skip, channels, ((x, carry, 0), (x, logs + skip * row, row)), ((g, begin + skip * stride, stride),))


@jit_inside
def next_chunk(x, logs, row, g, codes, start, begin, stride, channels, most):
    """Tokens in the chunk that begins at token `start` of the batch, and whether its first decay is left out.

    g[begin:] are the first token's logs, `stride` apart from the next one's.
    """
    size = min(most, CHUNK)
    if codes.size > 0:
        for m in range(1, size):
            if codes[start + m] != 0:
                size = m
                break
    strong = too_strong(g, begin, channels)
    cumulate_logs(x, logs, row, g, begin, stride, channels, size, strong)
    # Decays only add up, so the last row is the strongest: mostly one look is enough.
    while size > 1 and too_strong(x, logs + (size - 1) * row, channels):
        size -= 1
    return size, strong


@jit_inside
def exp_of(x, at, keys, logs, begin, channels):
    """x[at : at + keys] = exp of the logs, or of the only one."""
    if channels == 1:
        exp(1, keys, ((x, at, 0),), ((logs, begin),))
    else:
        exp(1, keys, ((x, at, 0),), ((logs, begin, 0),))

"""What each op must do: floating-point operations and bytes of its forward and of its backward, from its equation.

The operations are those of the recurrence, computed in the cheapest literal way; what a chunked form computes on top,
and what a backward computes again, costs time and is no work done. The bytes are those of every input read once and
every result written once, in float32; a backward reads the inputs and the gradient of the output and writes the
gradients of the inputs. States, one per sequence, are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tidegate.bench.roofline import Work

STATES = 16  # N of the selective scan
TAPS = 4  # W of the short convolution
EXP = 10  # operations of one exponential: a range reduction and a polynomial


@dataclass(frozen=True)
class Shape:
    """The letters B, T, H, K, V."""

    batch: int = 4
    time: int = 2048
    heads: int = 4
    key_dim: int = 64
    value_dim: int = 64

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch * self.time

    @property
    def channels(self) -> int:
        """D = H * V, for the ops without heads."""
        return self.heads * self.value_dim


Counted = tuple[Work, Work]  # forward; backward, which comes on top


def _counted(forward: float, backward: float, inputs: float, outputs: float) -> Counted:
    return Work(forward, 4 * (inputs + outputs)), Work(backward, 4 * (2 * inputs + outputs))


def _outer_products(s: Shape, per_element: int, inputs: int, values: int | None = None) -> Counted:
    """`per_element` operations on each of the K V numbers of the state; the gradient of a product is two products.

    `inputs` numbers come in for each token and head.
    """
    rows = s.tokens * s.heads
    flops = per_element * rows * s.key_dim * (s.value_dim if values is None else values)
    return _counted(flops, 2 * flops, rows * inputs, rows * s.value_dim)


def linear_attention(s: Shape, decays: int) -> Counted:
    """S <- decay S (1, where there is a decay), S <- S + k v^T (2), o = S^T q (2). `decays`: per token and head."""
    return _outer_products(s, 4 + (decays > 0), 2 * s.key_dim + s.value_dim + decays)


def mlstm(s: Shape) -> Counted:
    """As linear attention with a decay per head and one more column of values, the normaliser; two gates come in."""
    return _outer_products(s, 5, 2 * s.key_dim + s.value_dim + 2, s.value_dim + 1)


def delta_rule(s: Shape, decays: int) -> Counted:
    """S <- decay S (1, where there is a decay), u = beta (v - S^T k) (2), S <- S + k u^T (2), o = S^T q (2)."""
    return _outer_products(s, 6 + (decays > 0), 2 * s.key_dim + s.value_dim + 1 + decays)


def dplr(s: Shape) -> Counted:
    """u = S^T a (2), S <- decay S (1), S <- S + b u^T (2), S <- S + k v^T (2), o = S^T q (2); the decay is key-wise."""
    return _outer_products(s, 9, 5 * s.key_dim + s.value_dim)


def gated_norm(s: Shape) -> Counted:
    """Per number its square and their sum (2), the norm, the weight and the gate (3), silu (3 and the exponential).

    Backward: into x, the mean square, the gate and the weight, a product or two each (12), and the silu's slope (4).
    """
    size = s.tokens * s.channels
    return _counted((EXP + 8) * size, 16 * size, 2 * size, size)


def scan(s: Shape) -> Counted:
    """h = a h + b (2); backward flow + dh (1), times a (1), times h (1): b is not needed again, but h is."""
    size = s.tokens * s.channels
    return _counted(2 * size, 3 * size, 2 * size, size)


def short_convolution(s: Shape) -> Counted:
    """A product and a sum per tap (2 W); backward one for the input and one for the weights (4 W)."""
    size = s.tokens * s.channels
    return _counted(2 * TAPS * size, 4 * TAPS * size, size, size)


def long_convolution(s: Shape) -> Counted:
    """By FFTs of 2 T numbers, 2.5 log2(2 T) operations for each: of x, of the filters, and one back.

    Backward: of x, the filters and the gradient, and two back. Between them a product of complex numbers (6 for two).
    """
    size, filters = s.tokens * s.channels, s.time * s.channels
    transform = 5 * math.log2(2 * s.time)  # per token: twice as many numbers are turned
    forward = transform * (2 * size + filters) + 6 * size
    backward = transform * (3 * size + 2 * filters) + 14 * size
    return _counted(forward, backward, size + filters, size)


def selective_scan(s: Shape) -> Counted:
    """Per channel and state: exp(dt A) (1 and the exponential), dt x B (1), h = decay h + that (2), y += C h (2).

    Backward: into h, C, the decay, its exponent, dt, A, B and dt x, each a product and mostly a sum (15). x and dt come
    in per channel, B and C per state.
    """
    size, shared = s.tokens * s.channels, 2 * s.tokens * STATES
    return _counted((EXP + 6) * STATES * size, 15 * STATES * size, 2 * size + shared, size)


def attention(s: Shape) -> Counted:
    """Two products over the causal half of all pairs of tokens."""
    pairs = s.batch * s.heads * s.time * (s.time + 1) / 2
    flops, rows = 2 * pairs * (s.key_dim + s.value_dim), s.tokens * s.heads
    return _counted(flops, 2 * flops, rows * (2 * s.key_dim + s.value_dim), rows * s.value_dim)

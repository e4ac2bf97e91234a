"""Vector values in kernels: their arithmetic, their edges, and their accuracy."""

from __future__ import annotations

import numpy as np

from tidegate.ops import vector
from tidegate.ops.kernels import LANES, jit, wide_vectors
from tidegate.ops.vector import exp, exp2, fill, load_some, log1p, sigmoid, softplus, splat, store_some, total


@jit
def functions(x, out):
    wide_vectors()
    for i in range(0, x.size, LANES):
        count = x.size - i
        v = load_some(x, i, count)
        store_some(out[0], i, exp2(v), count)
        store_some(out[1], i, exp(v), count)
        store_some(out[2], i, softplus(v), count)
        store_some(out[3], i, sigmoid(v), count)
        store_some(out[4], i, log1p(sigmoid(v)), count)


@jit
def arithmetic(x, y, out):
    wide_vectors()
    a, b = vector.load(x, 0), splat(y, 1)
    vector.store(out, 0, (a + b) * b - a / fill(np.float32(4.0)))
    vector.store(out, LANES, vector.where_negative(a, vector.absolute(a), fill(np.float32(0.0))))
    out[2 * LANES] = total(a)


def found(x):
    out = np.full((5, x.size), np.nan, np.float32)
    functions(x, out)
    return out.astype(np.float64)


def test_functions_are_accurate():
    x = np.linspace(-86, 86, 100_003).astype(np.float32)  # no multiple of a vector
    wide = x.astype(np.float64)
    sigmoids = 1 / (1 + np.exp(-wide))
    expected = np.stack([np.exp2(wide), np.exp(wide), np.logaddexp(0, wide), sigmoids])
    seen = found(x)
    assert np.max(np.abs(seen[:4] / expected - 1)) < 2e-7
    assert np.max(np.abs(seen[4] / np.log1p(seen[3]) - 1)) < 2e-7


def test_functions_at_the_ends():
    seen = found(np.array([0.0, -0.0, -1e-40, -127.0, -1e4, -np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(seen[0], [1, 1, 1, 0, 0, 0, np.nan])
    np.testing.assert_array_equal(seen[1, :3], [1, 1, 1])
    assert (seen[1:4, 3:6] < 2e-38).all()
    assert np.isnan(seen[:, 6]).all()
    big = found(np.array([100.0, 1e30], np.float32))
    np.testing.assert_array_equal(big[2], np.array([100.0, 1e30], np.float32))
    np.testing.assert_array_equal(big[3], [1, 1])


def test_arithmetic_and_memory():
    x, y = np.random.default_rng(0).normal(size=(2, LANES)).astype(np.float32)
    out = np.full(2 * LANES + 1, np.nan, np.float32)
    arithmetic(x, y, out)
    np.testing.assert_allclose(out[:LANES], (x + y[1]) * y[1] - x / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[LANES:-1], np.maximum(-x, 0))
    np.testing.assert_allclose(out[-1], x.sum(), rtol=1e-5, atol=1e-6)


def test_parts_of_a_vector_leave_their_neighbours_alone():
    x = np.ones(LANES + 3, np.float32)
    wide = np.full((5, LANES + 8), np.nan, np.float32)
    functions(x, wide[:, : LANES + 3])
    assert np.isnan(wide[:, LANES + 3 :]).all()

"""Products, triangular systems, transposes and elementwise passes against NumPy; shares of problems."""

import numpy as np
import pytest
import torch

from tidegate.ops import linear_attention
from tidegate.ops.chunks import cumulate, dot, exp_and_inverse
from tidegate.ops.kernels import LANES, jit_views
from tidegate.ops.threads import _bounds
from tidegate.ops.tiles import product, solve, transpose

SIZES = [(16, 64, 64), (7, 19, 37), (1, 3, 5), (13, 70, 100)]  # rows, inner, columns

earlier, scaled, lower = product(shape="lower"), product(start="add", finish="rows"), product(keep="lower", narrow=True)
later, strict = product(shape="upper", finish="matrix"), product(keep="strict")
forward, backward = solve(16), solve(16, transposed=True)


@jit_views
def products(n, K, V, a, b, c, d, s, factors, o, p, scores, strictly, turned):
    earlier(n, V, (o, 0, V), (a, 0, K, 1), (b, 0, V), K, ((c, 0, n, 1), (d, 0, V), n), (o, 0, 0))
    later(n, V, (p, 0, V), (a, 0, K, 1), (b, 0, V), K, ((c, 0, 1, n), (d, 0, V), n), (factors, 0, 0))
    scaled(K, V, (s, 0, V), (a, 0, 1, K), (d, 0, V), n, (), (factors, 0, 0))
    transpose(n, K, (turned, 0, LANES), (a, 0, K))
    lower(n, LANES, (scores, 0, LANES), (a, 0, K, 1), (turned, 0, LANES), K, (), (a, 0, 0))
    strict(n, LANES, (strictly, 0, LANES), (a, 0, K, 1), (turned, 0, LANES), K, (), (a, 0, 0))


@jit_views
def passes(n, K, x, y, e, inverse, carry, sums, sums_of_rows):
    exp_and_inverse(n, K, ((e, 0, K), (inverse, 0, K)), ((x, 0, 2 * K),))
    cumulate(n, K, ((carry, 0, 0), (sums, 0, K)), ((y, 0, K),))
    dot(n, K, ((sums_of_rows, 0),), ((y, 0, K), (x, 0, 2 * K)))


@jit_views
def systems(columns, y, z, a):
    forward(columns, (y, 0, columns), (a, 0, 16))
    backward(columns, (z, 0, columns), (a, 0, 16))


def normal(*shape):
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("n", "K", "V"), SIZES)
def test_products(n, K, V):
    n = min(n, LANES)
    a, b, c, d, s, factors = normal(n, K), normal(K, V), np.tril(normal(n, n)), normal(n, V), normal(K, V), normal(128)
    o, p, scores, strictly = np.zeros_like(d), np.zeros_like(d), normal(n, LANES), normal(n, LANES)
    before, turned = s.copy(), np.full((128, LANES), np.nan, np.float32)
    arrays = (a, b, c, d, s, factors, o, p, scores, strictly, turned)
    products(n, K, V, *(x.reshape(-1) for x in arrays))
    np.testing.assert_allclose(o, a @ b + c @ d, atol=1e-4)
    np.testing.assert_allclose(p, (a @ b + c.T @ d) * factors[:V], atol=1e-4)
    np.testing.assert_allclose(s, factors[:K, None] * (before + a.T @ d), atol=1e-4)
    np.testing.assert_array_equal(turned[:K, :n], a.T)
    for found, expected in ((scores, np.tril(a @ a.T)), (strictly, np.tril(a @ a.T, -1))):
        np.testing.assert_allclose(found[:, :n], expected, atol=1e-4)
        assert not found[:, n:].any()


@pytest.mark.parametrize(("n", "K"), [(16, 64), (5, 3), (1, 17)])
def test_passes(n, K):
    x, y = 20 * normal(n, 2 * K), normal(n, K)
    e, inverse, sums, carry, rows = normal(n, K), normal(n, K), normal(n, K), np.zeros(K, np.float32), normal(n)
    passes(n, K, *(z.reshape(-1) for z in (x, y, e, inverse, carry, sums, rows)))
    np.testing.assert_allclose(e, np.exp(x[:, :K].astype(float)), rtol=3e-7)
    np.testing.assert_allclose(inverse, np.exp(-x[:, :K].astype(float)), rtol=3e-7)
    np.testing.assert_allclose(sums, y.cumsum(0), atol=1e-5)
    np.testing.assert_array_equal(carry, sums[-1])
    np.testing.assert_allclose(rows, (x[:, :K] * y).sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [64, 5])
def test_triangular_systems(columns):
    a, y = np.tril(normal(16, 16), -1) / 4, normal(16, columns)
    found, transposed = y.copy(), y.copy()
    systems(columns, found.reshape(-1), transposed.reshape(-1), a.reshape(-1))
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(16) - a, y), atol=1e-4)
    np.testing.assert_allclose(transposed, np.linalg.solve(np.eye(16) - a.T, y), atol=1e-4)


def test_problems_are_broken_up_only_where_that_helps():
    assert _bounds(4, 4, 2) == [0, 8, 16]
    assert _bounds(1, 4, 2) == [0, 2, 4]
    assert _bounds(3, 4, 2) == [0, 6, 12]
    assert _bounds(3, 1, 2) == [0, 1, 3]
    assert _bounds(15, 4, 8) == [15 * share // 8 * 4 for share in range(9)]


@pytest.mark.parametrize("decay", ["none", "head", "key"])
@pytest.mark.parametrize("heads", [1, 3])
def test_broken_up_problems_give_the_same_bits(heads, decay):
    shape = {"none": None, "head": (1, 300, heads), "key": (1, 300, heads, 40)}[decay]
    sizes = (40, 40, 56)
    inputs = [torch.randn(1, 300, heads, size) for size in sizes] + [torch.randn(1, heads, 40, 56)]
    g = None if shape is None else -torch.rand(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            q, k, v, state, *rest = leaves = [
                x.clone().requires_grad_() for x in (*inputs, *([] if g is None else [g]))
            ]
            o, last = linear_attention(q, k, v, *rest, state=state)
            gradients = torch.autograd.grad(o.square().sum() + last.square().sum(), leaves)
            results.append((o, last, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))

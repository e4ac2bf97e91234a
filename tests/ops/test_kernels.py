"""The Numba toolkit: what every kernel is built from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidegate.ops import kernels, matrix
from tidegate.ops.kernels import LANES, array, exp32, jit, pad
from tidegate.ops.matrix import matmul


@jit
def exponentials(begin, end, x, y):
    for i in range(begin, end):
        y[i] = exp32(x[i])


def exp(x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    exponentials(0, len(x), x, y)
    return y


# -- exp32 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("low", "high"), [(-87.0, 88.0), (-1.0, 0.0), (-1e-3, 1e-3)])
def test_exp32_is_accurate(low, high):
    x = np.linspace(low, high, 300_001).astype(np.float32)
    x = x[(x >= -87) & (x <= 88)]
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exp(x) - expected) / expected) < 1.25e-7


def test_exp32_at_the_ends():
    x = np.array([np.nan, -np.inf, -3e38, -1e4, -87.01, 0.0, -0.0, 1e-40, -1e-40], np.float32)
    np.testing.assert_array_equal(exp(x), np.array([np.nan, 0, 0, 0, 0, 1, 1, 1, 1], np.float32))
    # Above 88 it stays at exp(88): a kernel never meets infinity times zero.
    top = exp(np.array([88.0, 88.5, 89.0, 1e4, 3e38, np.inf], np.float32))
    assert (top == top[0]).all()
    np.testing.assert_allclose(top[0], np.exp(88.0), rtol=1.25e-7)


def test_exp32_does_not_depend_on_its_place_in_a_vector():
    """The vectorised body and the scalar remainder of a loop give the same bits."""
    x = np.random.default_rng(0).uniform(-90, 90, 61).astype(np.float32)
    whole = exp(x)
    np.testing.assert_array_equal(whole, np.concatenate([exp(x[i : i + 1]) for i in range(61)]))
    np.testing.assert_array_equal(whole[3:], exp(x[3:].copy()))


def test_exp32_is_monotonous_across_its_range_reduction():
    x = np.linspace(-20, 1, 100_001).astype(np.float32)
    y = exp(x).astype(np.float64)
    assert (y[1:] >= y[:-1] * (1 - 2.5e-7)).all()


# -- matmul ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("inner", [0, 1, 7, 64])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_adds_the_product(rows, inner, vectors, transposed):
    random = np.random.default_rng(rows + inner + vectors)
    columns, wide = vectors * LANES, (vectors + 1) * LANES
    a = random.standard_normal((rows, inner)).astype(np.float32)
    b = random.standard_normal((max(inner, 1), wide)).astype(np.float32)
    o = random.standard_normal((rows + 1, wide)).astype(np.float32)
    expected = o.astype(np.float64)
    expected[:rows, :columns] += a.astype(np.float64) @ b[:inner, :columns].astype(np.float64)
    if transposed:
        stored = np.ascontiguousarray(a.T) if inner else np.zeros((1, rows), np.float32)
        matmul(stored, 1, stored.shape[1], b, o, rows, inner, columns)
    else:
        stored = np.full((rows, inner + 3), np.nan, np.float32)  # rows longer than what is read of them
        stored[:, :inner] = a
        matmul(stored, stored.shape[1], 1, b, o, rows, inner, columns)
    # The row below and the columns beside are exactly as they were.
    np.testing.assert_array_equal(o[rows:], expected[rows:].astype(np.float32))
    np.testing.assert_array_equal(o[:, columns:], expected[:, columns:].astype(np.float32))
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-6 * (1 + inner) ** 0.5 * 4)


@pytest.mark.parametrize("vectors", [1, 3, 7])
@pytest.mark.parametrize("inner", [1, 9])
def test_the_other_starts_of_a_product(inner, vectors):
    random = np.random.default_rng(vectors)
    a = random.standard_normal((8, inner)).astype(np.float32)
    b, before = (random.standard_normal((n, vectors * LANES)).astype(np.float32) for n in (inner, 8))
    rows, columns = random.standard_normal(8).astype(np.float32), random.standard_normal(len(b[0])).astype(np.float32)
    arguments = (8, inner, vectors * LANES)
    for start, expected, function, factors in [
        (np.full_like(before, np.nan), a @ b, matrix.matmul_into, ()),
        (before.copy(), rows[:, None] * before + a @ b, matrix.matmul_rows, (rows,)),
        (before.copy(), columns * before + a @ b, matrix.matmul_columns, (columns,)),
    ]:
        function(a, inner, 1, b, start, *arguments, *factors)
        np.testing.assert_allclose(start, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (LANES, 2 * LANES), (3 * LANES, LANES)])
def test_transpose(rows, columns):
    x = np.random.default_rng(0).standard_normal((pad(rows), pad(columns))).astype(np.float32)
    o = np.full((pad(columns), pad(rows)), np.nan, np.float32)
    matrix.transpose(x, rows, columns, o)
    np.testing.assert_array_equal(o, x.T)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("columns", [1, 256, 257, 5000])
def test_blocks_do_not_split_a_vector_whatever_the_threads(rows, columns):
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert kernels.block(columns, rows) % 256 == 0
        assert 0 < kernels.block(columns, rows) <= 1024


def test_matmul_hands_on_nan_and_infinity():
    a, b = np.ones((4, 2), np.float32), np.ones((2, LANES), np.float32)
    a[1, 0], a[2, 0] = np.nan, np.inf
    o = np.zeros((4, LANES), np.float32)
    matmul(a, 2, 1, b, o, 4, 2, LANES)
    assert np.isnan(o[1]).all()
    assert np.isposinf(o[2]).all()
    assert (o[[0, 3]] == 2).all()


@pytest.mark.parametrize(("columns", "padded"), [(0, 1), (1, 1), (LANES, 1), (LANES + 1, 2), (5 * LANES, 5)])
def test_pad_rounds_up_to_whole_vectors(columns, padded):
    assert pad(columns) == padded * LANES


# -- array -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_array_is_float32_and_contiguous(dtype):
    x = torch.randn(4, 6, requires_grad=True).to(dtype)
    view = array(x.t())
    assert view.dtype == np.float32
    assert view.flags.c_contiguous
    np.testing.assert_array_equal(view, x.t().detach().float().numpy())


def test_array_shares_memory_where_it_can_and_resolves_lazy_conjugates():
    x = torch.randn(3)
    array(x)[0] = 5
    assert x[0] == 5
    z = torch.randn(3, dtype=torch.complex64)
    np.testing.assert_array_equal(array(z.conj()), z.numpy().conj())
    np.testing.assert_array_equal(array(z.conj().imag), -z.numpy().imag)

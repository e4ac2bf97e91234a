"""The Numba toolkit: what every kernel is built from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES, array, exp32, jit, pad


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


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("columns", [1, 256, 257, 5000])
def test_blocks_do_not_split_a_vector_whatever_the_threads(rows, columns):
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert kernels.block(columns, rows) % 256 == 0
        assert 0 < kernels.block(columns, rows) <= 1024


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

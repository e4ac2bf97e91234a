"""The ceilings, and the counts that are held against them, done again by hand."""

from __future__ import annotations

import pytest

from tidegate.bench import counts, model
from tidegate.bench.counts import Shape
from tidegate.bench.mixers import build, cost, work
from tidegate.bench.roofline import Rates, Work, roof

SHAPE = Shape(batch=2, time=16, heads=3, key_dim=4, value_dim=5)
ROWS, STATE, CHANNELS = 2 * 16 * 3, 4 * 5, 2 * 16 * 3 * 5


def test_the_nearer_ceiling_bounds():
    rates = Rates(matmul=100.0, stream=10.0)
    computing = roof(Work(flops=400, bytes=20), rates, seconds=8.0)
    assert (computing.bound, computing.seconds, computing.reached) == ("matmul", 4.0, 0.5)
    moving = roof(Work(flops=400, bytes=80), rates, seconds=16.0)
    assert (moving.bound, moving.seconds, moving.reached) == ("stream", 8.0, 0.5)


def test_work_adds_up():
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)
    assert Work(1, 2).times(3) == Work(3, 6)


@pytest.mark.parametrize(
    ("counted", "flops", "backward_flops", "numbers_in", "numbers_out"),
    [
        # q, k of 4 and v of 5 come in, o of 5 goes out, and per row of the state the decays and gates
        (counts.linear_attention(SHAPE, 4), ROWS * STATE * 5, ROWS * STATE * 10, ROWS * (4 + 4 + 5 + 4), ROWS * 5),
        (counts.linear_attention(SHAPE, 1), ROWS * STATE * 5, ROWS * STATE * 10, ROWS * (4 + 4 + 5 + 1), ROWS * 5),
        (counts.linear_attention(SHAPE, 0), ROWS * STATE * 4, ROWS * STATE * 8, ROWS * (4 + 4 + 5), ROWS * 5),
        (counts.mlstm(SHAPE), ROWS * 4 * 6 * 5, ROWS * 4 * 6 * 10, ROWS * (4 + 4 + 5 + 2), ROWS * 5),
        (counts.delta_rule(SHAPE, 0), ROWS * STATE * 6, ROWS * STATE * 12, ROWS * (4 + 4 + 5 + 1), ROWS * 5),
        (counts.delta_rule(SHAPE, 1), ROWS * STATE * 7, ROWS * STATE * 14, ROWS * (4 + 4 + 5 + 1 + 1), ROWS * 5),
        (counts.dplr(SHAPE), ROWS * STATE * 9, ROWS * STATE * 18, ROWS * (5 * 4 + 5), ROWS * 5),
        (counts.scan(SHAPE), 2 * CHANNELS, 3 * CHANNELS, 2 * CHANNELS, CHANNELS),
        (counts.short_convolution(SHAPE), 8 * CHANNELS, 16 * CHANNELS, CHANNELS, CHANNELS),
        (
            counts.long_convolution(SHAPE),  # 2 rows of 16 tokens; 32 numbers in an FFT, 5 log2(32) per token
            25 * (2 * CHANNELS + CHANNELS // 2) + 6 * CHANNELS,
            25 * (3 * CHANNELS + CHANNELS) + 14 * CHANNELS,
            CHANNELS + CHANNELS // 2,
            CHANNELS,
        ),
        (counts.gated_norm(SHAPE), 18 * CHANNELS, 16 * CHANNELS, 2 * CHANNELS, CHANNELS),
        (
            counts.selective_scan(SHAPE),
            16 * 16 * CHANNELS,
            15 * 16 * CHANNELS,
            2 * CHANNELS + 2 * 2 * 16 * 16,
            CHANNELS,
        ),
        (counts.attention(SHAPE), 6 * 136 * 2 * (4 + 5), 6 * 136 * 4 * (4 + 5), ROWS * (4 + 4 + 5), ROWS * 5),
    ],
)
def test_counts_of_the_ops(counted, flops, backward_flops, numbers_in, numbers_out):
    forward, backward = counted
    assert forward == Work(flops, 4 * (numbers_in + numbers_out))
    # the inputs and the gradient of the output are read, the gradients of the inputs written
    assert backward == Work(backward_flops, 4 * (2 * numbers_in + numbers_out))


def test_a_matrix_is_two_operations_per_weight_and_token():
    forward, training = work("gla", batch=2, length=10, dim=64)
    assert forward.flops == 20 * cost("gla", 64).flops_per_token
    assert training.flops == 3 * forward.flops
    assert forward.bytes == 4 * (2 * 20 * 64 + cost("gla", 64).parameters)


def test_attention_looks_at_every_earlier_token():
    matrices = 2 * sum(p.numel() for p in build("attention", 64).parameters() if p.ndim > 1)
    assert work("attention", 3, 10, 64)[0].flops == 3 * (10 * matrices + 4 * 64 * 55)


def test_a_long_convolution_is_an_fft():
    matrices = 2 * sum(p.numel() for p in build("hyena", 64).parameters() if p.ndim > 1)
    transforms = counts.long_convolution(counts.Shape(3, 10, heads=1, value_dim=64))[0].flops
    assert work("hyena", 3, 10, 64)[0].flops == 30 * matrices + transforms
    assert cost("hyena", 64, order=3).flops_per_cached_token == 2 * 2 * 64


def test_a_window_fills_up():
    mixer = build("sliding-window-attention", 64)
    matrices = 2 * sum(p.numel() for p in mixer.parameters() if p.ndim > 1)
    for length in (10, mixer.window + 10):
        seen = sum(min(t, mixer.window) for t in range(1, length + 1))
        found = work("sliding-window-attention", 1, length, 64)[0].flops
        assert found == length * matrices + 4 * 64 * seen


@pytest.mark.parametrize("name", ["attention", "gla", "mamba2"])
def test_counts_of_a_model(name):
    built = model.build(name, 64, layers=3, vocabulary=100)
    forward, training = model.work(name, 2, 10, 64, layers=3, vocabulary=100)
    matrices = sum(p.numel() for p in built.parameters() if p.ndim > 1)  # the tied embedding is the head's matrix
    recurrences = 3 * work(name, 2, 10, 64)[0].flops
    own = sum(p.numel() for p in build(name, 64).parameters() if p.ndim > 1)
    assert forward.flops == pytest.approx(recurrences + 2 * 20 * (matrices - 3 * own))
    assert training.flops == 3 * forward.flops
    assert training.bytes > 4 * 10 * matrices


def test_models_have_the_size_of_the_transformer():
    wanted = model.build("attention", 256, layers=1).num_parameters
    for name in ("gla", "gated-deltanet", "rwkv7", "lstm"):
        assert model.build(name, 256, layers=1).num_parameters == pytest.approx(wanted, rel=0.02)

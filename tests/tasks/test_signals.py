"""Signals: their spectra, their statistics, and every target by a loop or another formula."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate.tasks.signals import adding, band_signals, delay, products, reconstruct, white_signal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "freq"), [(200, 5.0), (200, 20.0), (101, 50.0)])
def test_white_signals_have_no_high_tones_and_the_power_asked_for(length, freq):
    signal = white_signal(4000, generator(), length=length, dt=0.01, freq=freq, rms=0.5).double()
    assert signal.shape == (4000, length)
    assert (signal[:, 0] == 0).all()
    if length % 2 == 0:  # an odd signal is cut from a longer one, and its spectrum blurred
        power = torch.fft.rfft(signal).abs().square().mean(0)
        loud = torch.fft.rfftfreq(length, 0.01) <= freq
        assert power[~loud].max() < 1e-6 * power.max()
        assert power[1:][loud[1:]].min() > 0.85 * power[1:].max(), "white below the limit"
    deviation = (signal - signal.mean(1, keepdim=True)).square().mean().sqrt().item()
    assert deviation == pytest.approx(0.5, rel=0.05)


def test_delay_and_reconstruct_are_shifts():
    inputs, targets = delay(3, generator(), length=50, lag=20, dt=0.02)
    assert torch.equal(targets[:, 20:], inputs[:, :30])
    assert (targets[:, :20] == 0).all()
    inputs, targets = reconstruct(3, generator(), length=50, memory=20, dt=0.02)
    assert torch.equal(targets, inputs[:, 30:, 0])


@pytest.mark.parametrize("length", [2, 3, 41])
def test_adding_adds_one_of_each_half(length):
    inputs, targets = adding(500, generator(), length=length)
    marked = inputs[..., 1] == 1
    assert (marked.sum(1) == 2).all()
    assert (marked[:, : length // 2].sum(1) == 1).all()
    torch.testing.assert_close(targets[:, 0], torch.where(marked, inputs[..., 0], 0).sum(1))
    assert marked.any(0).all(), "every place is possible"


def test_a_constant_answer_to_adding_has_an_error_of_a_sixth():
    _, targets = adding(20_000, generator(), length=10)
    assert (targets - 1).square().mean().item() == pytest.approx(1 / 6, rel=0.05)


def test_bands_are_found_in_the_spectrum_and_survive_half_the_rate():
    inputs, classes = band_signals(300, generator(), noise=0.3)
    for signal in (inputs, inputs[:, ::2]):
        power = torch.fft.rfft(signal[..., 0]).abs()
        assert torch.equal(power[:, [2, 4, 8]].argmax(1), classes)
        assert power[:, 20:].max() < 1e-3 * power.max(), "nothing above 16 Hz that half the rate would fold down"
    assert len(classes.unique()) == 3


def test_products_follow_their_recurrence():
    u, y = (part[..., 0].double() for part in products(4, generator(), length=12, decay=0.6))
    for t in range(12):  # the recurrence, unrolled
        wanted = sum(0.6 ** (t - s) * u[:, s] * u[:, s - 1] for s in range(1, t + 1))
        torch.testing.assert_close(y[:, t], torch.zeros(4).double() + wanted, rtol=1e-5, atol=1e-6)


def test_products_are_uncorrelated_with_their_input_and_have_the_variance_promised():
    u, y = products(20_000, generator(), length=40)
    assert (u[:, :, 0] * y[:, -1:, 0]).mean(0).abs().max() < 5 * math.sqrt(3 / 20_000)
    assert y[:, -1].square().mean().item() == pytest.approx(1 / (1 - 0.64), rel=0.08)


@pytest.mark.parametrize("draw", [delay, reconstruct, adding, band_signals, products])
def test_data_are_a_function_of_the_generator(draw):
    first, again, other = (draw(4, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("draw", "sizes", "message"),
    [
        (white_signal, {"freq": 0.1}, "freq, dt: seen 0.1"),
        (delay, {"length": 10, "lag": 10}, "lag: seen 10"),
        (reconstruct, {"length": 10, "memory": 11}, "memory: seen 11"),
        (adding, {"length": 1}, "length: seen 1"),
        (band_signals, {"frequencies": ()}, "frequencies: seen 0"),
        (products, {"length": 0}, "length: seen 0"),
    ],
)
def test_sizes_that_cannot_be_are_named(draw, sizes, message):
    with pytest.raises(ValueError, match=message):
        draw(2, generator(), **sizes)

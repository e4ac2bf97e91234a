"""LRU: the paper's recurrence, its convolution form, and its initialisation."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate import Segments, mixers


def matrices(lru):
    """lambda, gamma, B, C as the paper writes them."""
    eigenvalues = torch.exp(-torch.exp(lru.nu_log) + 1j * torch.exp(lru.theta_log))
    gamma = torch.exp(lru.gamma_log) if lru.normalise else torch.ones_like(lru.nu_log)
    B = torch.complex(lru.input_weight[:, 0], lru.input_weight[:, 1])
    C = torch.complex(lru.output_weight[..., 0], -lru.output_weight[..., 1])
    return eigenvalues, gamma, B, C


@pytest.mark.parametrize("normalise", [True, False])
def test_equals_the_recurrence_of_the_paper(normalise):
    lru = mixers.build("lru", 6, state_dim=5, normalise=normalise, dtype=torch.float64)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, state = lru(x)
    eigenvalues, gamma, B, C = matrices(lru)
    h = torch.zeros(2, 5, dtype=torch.complex128)
    for t in range(9):
        h = eigenvalues * h + gamma * (x[:, t].to(B.dtype) @ B.T)
        expected = (h @ C.T).real + lru.skip * x[:, t]
        torch.testing.assert_close(y[:, t], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state["memory"], h, atol=1e-12, rtol=1e-12)


def test_equals_a_convolution_by_fft():
    """y = x * K + skip x with K_s = Re(C lambda^s gamma B), the impulse response of a time-invariant system."""
    T = 50
    lru = mixers.build("lru", 4, state_dim=8, r_min=0.9, r_max=0.999, dtype=torch.float64)
    x = torch.randn(2, T, 4, dtype=torch.float64)
    eigenvalues, gamma, B, C = matrices(lru)
    powers = eigenvalues ** torch.arange(T)[:, None]
    kernel = torch.einsum("on,sn,n,ni->soi", C, powers, gamma.to(C.dtype), B).real
    spectrum = torch.einsum("foi,bfi->bfo", torch.fft.rfft(kernel, n=2 * T, dim=0), torch.fft.rfft(x, n=2 * T, dim=1))
    expected = torch.fft.irfft(spectrum, n=2 * T, dim=1)[:, :T] + lru.skip * x
    torch.testing.assert_close(lru(x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, math.pi / 10)])
def test_initialisation(r_min, r_max, max_phase):
    states, dim = 4000, 16
    lru = mixers.build("lru", dim, state_dim=states, r_min=r_min, r_max=r_max, max_phase=max_phase)
    with torch.no_grad():
        eigenvalues, gamma, _, _ = matrices(lru)
        torch.testing.assert_close(eigenvalues, lru.eigenvalues())
        radius, phase = eigenvalues.abs().double(), torch.exp(lru.theta_log)
        assert radius.min() >= r_min - 1e-6
        assert radius.max() <= r_max + 1e-6
        # Uniform in area: the squared radius has the mean of its range, and its standard deviation.
        area = (radius**2 - r_min**2) / (r_max**2 - r_min**2)
        assert abs(float(area.mean()) - 0.5) < 0.03
        assert abs(float(area.std()) - 12**-0.5) < 0.02
        assert phase.min() > 0
        assert phase.max() <= max_phase + 1e-5
        assert abs(float(phase.mean()) / max_phase - 0.5) < 0.03
        torch.testing.assert_close(gamma.double() ** 2, 1 - radius**2, atol=1e-5, rtol=1e-3)
        for weight, std in ((lru.input_weight, (2 * dim) ** -0.5), (lru.output_weight, states**-0.5)):
            assert abs(float(weight.std()) / std - 1) < 0.02


def test_gamma_keeps_the_variance_of_white_noise():
    lru = mixers.build("lru", 8, state_dim=64, r_min=0.9, r_max=0.99)
    _, _, B, _ = matrices(lru)
    with torch.no_grad():
        h = lru(torch.randn(512, 400, 8))[1]["memory"]  # 0.99^400 = 0.02: as good as stationary
    ratio = h.abs().square().mean(0) / B.abs().square().sum(1)  # E|h|^2 = |b|^2 where gamma does its work
    assert abs(float(ratio.mean()) - 1) < 0.05


def test_a_thin_ring_stays_finite():
    for r_min, r_max in ((1.0, 1.0), (0.9999, 0.9999), (0.0, 1e-3)):
        lru = mixers.build("lru", 4, r_min=r_min, r_max=r_max)
        assert all(parameter.isfinite().all() for parameter in lru.parameters())
        assert lru(torch.randn(1, 20, 4))[0].isfinite().all()


def test_half_precision_keeps_a_wide_state():
    lru = mixers.build("lru", 6, state_dim=5, dtype=torch.bfloat16)
    y, state = lru(torch.randn(2, 9, 6, dtype=torch.bfloat16), segments=Segments.packed([[4, 5], [9]]))
    assert y.dtype == torch.bfloat16
    assert state["memory"].dtype == torch.complex64
    assert lru.double().init_state(1)["memory"].dtype == torch.complex128


def test_errors_name_the_option():
    for match, options in (
        ("state_dim: seen 0", {"state_dim": 0}),
        ("r_min, r_max: seen 0.9 and 0.5", {"r_min": 0.9, "r_max": 0.5}),
        ("r_min, r_max: seen 0.5 and 1.5", {"r_min": 0.5, "r_max": 1.5}),
        ("max_phase: seen 0", {"max_phase": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            mixers.build("lru", 4, **options)

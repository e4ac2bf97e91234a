"""Convolutions over grids: along one axis after the other, by n-dimensional FFT, and as the sum they are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tidegate.nn.grid import GridConvolution
from tidegate.nn.state_space import kernel

D = 3
CASES = [
    ((7,), dict()),
    ((4, 5), dict()),
    ((4, 5), dict(rank=2, init="lin", rule="bilinear")),
    ((1, 6), dict(two_sided=False, num_systems=1)),
    ((3, 2, 4), dict(two_sided=(False, True, True), rule="dirac", init="inv")),
    ((3, 1, 4), dict(rank=3, skip=False, bandlimit=0.5, init="lin", dt_max=(0.2, 1.0, 3.0))),
    ((5, 4), dict(init="real", state_dim=3)),
]
GRIDS = pytest.mark.parametrize(("sizes", "options"), CASES, ids=[str(i) for i in range(len(CASES))])


def build(sizes, options, **more):
    torch.manual_seed(1)
    options = {"state_dim": 6, **options}
    return GridConvolution(D, len(sizes), **options, dtype=torch.float64, **more)


def kernels_of(layer, axis, size, rate=1.0):
    """k^a (rank, D, 2 size - 1), lags 1 - size ... size - 1, from the parameters as S4D defines them."""
    system = layer.systems[axis]
    imag = torch.zeros_like(system.log_real) if system.imag is None else system.imag
    copies = system.dim // system.log_real.shape[0]
    A = torch.complex(-torch.exp(system.log_real), imag).repeat(copies, 1)
    B, C = (
        torch.view_as_complex(torch.nn.functional.pad(w, (0, 2 - w.shape[-1])).contiguous())
        for w in (system.input_weight, system.output_weight)
    )
    B, step = B.repeat(copies, 1), torch.exp(system.log_step)[:, None]
    C = (1 if system.imag is None else 2) * C
    if layer.bandlimit is not None:
        C = C * ((step * A.imag.abs() / (2 * math.pi)) < layer.bandlimit / 2)
    step = rate * step
    if system.rule == "bilinear":
        decay, taken = (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2) * B
    else:
        decay = torch.exp(step * A)
        taken = B if system.rule == "dirac" else (decay - 1) / A * B
    lag = torch.arange(size)
    k = (C * taken * decay ** lag[:, None, None]).real.sum(-1).t()  # (channels, size)
    before = torch.zeros_like(k)
    if layer.two_sided[axis]:
        k, before = k.chunk(2)
    return torch.cat([before.flip(1)[:, 1:], k], 1).unflatten(0, (layer.rank, D))


def brute_force(layer, x, kernels):
    sizes, y = x.shape[1:-1], torch.zeros_like(x)
    for at, seen in itertools.product(*[list(itertools.product(*map(range, sizes)))] * 2):
        taps = torch.ones(layer.rank, D, dtype=torch.float64)
        for axis, (p, q) in enumerate(zip(at, seen, strict=True)):
            taps = taps * kernels[axis][..., p - q + sizes[axis] - 1]
        y[(slice(None), *at)] += taps.mean(0) * x[(slice(None), *seen)]
    return y if layer.skip is None else y + layer.skip * x


def by_fft(layer, x, kernels):
    """One n-dimensional FFT with the outer product of the axes' kernels, as the paper computes it."""
    sizes = x.shape[1:-1]
    doubled = [2 * size - 1 for size in sizes]
    outer = kernels[0]
    for own in kernels[1:]:
        outer = outer[..., None] * own[:, :, *[None] * (outer.ndim - 2), :]
    axes = list(range(1, len(sizes) + 1))
    rolled = torch.roll(outer.mean(0), [1 - size for size in sizes], axes)  # lag 0 in front
    spectrum = torch.fft.rfftn(x.movedim(-1, 1), s=doubled, dim=[a + 1 for a in axes])
    spectrum = spectrum * torch.fft.rfftn(rolled, dim=axes)
    y = torch.fft.irfftn(spectrum, s=doubled, dim=[a + 1 for a in axes]).movedim(1, -1)
    y = y[(slice(None), *(slice(0, size) for size in sizes))]
    return y if layer.skip is None else y + layer.skip * x


@GRIDS
def test_equals_the_sum_and_the_fft(sizes, options):
    layer, x = build(sizes, options), torch.randn(2, *sizes, D, dtype=torch.float64)
    with torch.no_grad():
        for rate in (1.0, 0.5):
            kernels = [kernels_of(layer, axis, size, rate) for axis, size in enumerate(sizes)]
            y = layer(x, rate)
            torch.testing.assert_close(y, brute_force(layer, x, kernels), atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(y, by_fft(layer, x, kernels), atol=1e-10, rtol=1e-10)
        single = layer.float()(x.float(), rate)
        assert (single - y).abs().max() <= 2e-5 * y.abs().max()


@GRIDS
def test_gradients(sizes, options):
    layer, x = build(sizes, options), torch.randn(1, *sizes, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, 0.7))

    arguments = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True, atol=1e-6, rtol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 100])
def test_the_kernel_is_a_sum_of_powers(size):
    decay = torch.randn(4, 3, dtype=torch.complex128)
    decay = decay / (1 + decay.abs())
    weight = torch.randn(4, 3, dtype=torch.complex128)
    wanted = (weight[..., None] * decay[..., None] ** torch.arange(size)).real.sum(1)
    torch.testing.assert_close(kernel(decay, weight, size), wanted, atol=1e-12, rtol=1e-12)


def waves(size):
    """Smooth on [0, 1]^2 and zero towards its edges, at the middles of size x size pixels."""
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    window = torch.sin(math.pi * at) ** 2
    rows, columns = window * torch.sin(2 * math.pi * at), window * torch.cos(4 * math.pi * at)
    return torch.outer(rows, columns)[None, ..., None].expand(1, size, size, D)


def test_twice_the_resolution_at_half_the_rate():
    """The kernels approach one continuous kernel: errors shrink as pixels do; without the rate they do not."""
    torch.manual_seed(3)
    layer = GridConvolution(D, 2, state_dim=8, init="lin", dt_min=0.02, dt_max=0.1, skip=False, dtype=torch.float64)

    def pooled(size, rate):
        with torch.no_grad():
            y = layer(waves(size), rate)
        return y.unflatten(1, (16, size // 16)).unflatten(3, (16, size // 16)).mean((2, 4))

    exact = pooled(256, 16 / 256)
    errors = [float((pooled(size, 16 / size) - exact).norm() / exact.norm()) for size in (16, 32, 64, 128)]
    assert errors[-1] < 0.03
    assert all(later < 0.6 * before for before, later in itertools.pairwise(errors))
    assert float((pooled(64, 1.0) - exact).norm() / exact.norm()) > 0.7


def test_bandlimit_drops_what_a_grid_cannot_tell():
    """A state above half a turn per step looks like a slow one on the grid, and like itself on a finer one."""
    torch.manual_seed(0)
    limited, free = (
        GridConvolution(D, 1, state_dim=32, init="lin", dt_min=0.3, dt_max=0.3, bandlimit=b) for b in (1.0, None)
    )
    free.load_state_dict(limited.state_dict())
    system = limited.systems[0]
    turns = system.frequencies()
    torch.testing.assert_close(turns[0], 0.3 * torch.arange(16) / 2)
    kept = int((turns[0] < 0.5).sum())
    assert kept == 4
    with torch.no_grad():
        system.output_weight[:, :kept] = 0
        free.load_state_dict(limited.state_dict())
        assert not limited.kernels(0, 20).any()
        assert free.kernels(0, 20).abs().max() > 0.01


def test_errors():
    for name, options in (
        ("axes", dict(axes=0)),
        ("rank", dict(rank=0)),
        ("rule", dict(rule="trapezoid")),
        ("bandlimit", dict(bandlimit=0.0)),
        ("two_sided", dict(axes=2, two_sided=(True,))),
        ("dt_min", dict(axes=2, dt_min=(0.1, 0.1, 0.1))),
        ("dt_min, dt_max", dict(dt_min=2.0)),
        ("num_systems", dict(num_systems=4)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: seen"):
            GridConvolution(D, **options)
    layer = GridConvolution(D, 2)
    with pytest.raises(ValueError, match=r"^x: seen shape \(1, 4, 3\), wanted \(batch, 2 sizes of the grid, dim=3\)"):
        layer(torch.randn(1, 4, D))
    with pytest.raises(ValueError, match=r"^rate: seen 0\.0"):
        layer(torch.randn(1, 4, 4, D), rate=0.0)

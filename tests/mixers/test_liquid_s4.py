"""Liquid-S4: the recurrence, its expansion over subsets of inputs, the causal kernels, and S4D inside it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, registry
from tidegate.tasks.signals import products

D, T = 5, 17
VARIANTS = [
    dict(mode="exact", state_dim=6),
    dict(mode="exact", state_dim=3, init="real", clamp=False, num_systems=1, rule="zoh"),
    dict(mode="pb", state_dim=4, degree=4, contraction="lecun", init="lin"),
    dict(mode="pb", state_dim=4, degree=1, freeze_input=True),
    dict(mode="kb", state_dim=4, degree=3, contraction="tanh", init="inv", rule="dirac"),
    dict(mode="kb", state_dim=3, degree=2, init="real", output="none", step_per_state=True),
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))


def build(**options):
    """z itself, from weights large enough that products of inputs count."""
    mixer = Subject("liquid-s4", registry.info("liquid-s4").cls, D, {"output": "none", **options}).build()
    with torch.no_grad():
        mixer.log_step.add_(2.0)
    return mixer


def system(mixer):
    """a, b and C of the paper's formulas, the factor of conjugate pairs in C."""
    imag = torch.zeros_like(mixer.log_real) if mixer.imag is None else mixer.imag
    A = torch.complex(-torch.exp(mixer.log_real), imag)
    B, C = (torch.complex(w[..., 0], w[..., -1] if w.shape[-1] == 2 else 0 * w[..., 0])
            for w in (mixer.input_weight, mixer.output_weight))  # fmt: skip
    step = torch.exp(mixer.log_step)[:, None]
    a, b = (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2) * B
    return a, b, C * (1 if mixer.imag is None else 2)


# -- the contract, for the options that the tiny configuration leaves out ----------------------------------------------
@variants
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(options, kind):
    case = Subject("liquid-s4", registry.info("liquid-s4").cls, D, options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(kind))
    if segments is not None:
        x[~segments.valid] = float("nan")
    check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), whole(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, range(1, T), segments), whole(mixer, segments), x, state)
    single = case.build(torch.float32)
    clean = x.nan_to_num()
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), clean, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


@variants
def test_every_weight_matters_and_half_precision_keeps_a_wide_state(options):
    mixer = Subject("liquid-s4", registry.info("liquid-s4").cls, D, options).build()
    mixer(torch.randn(2, 9, D, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    y, state = mixer.bfloat16()(torch.randn(2, 9, D).bfloat16())
    assert (y.dtype, state["memory"].dtype) == (torch.bfloat16, torch.complex64)


# -- exact -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("init", ["legs", "real"])
def test_exact_is_the_recurrence(clamp, init):
    mixer = build(mode="exact", state_dim=4, init=init, clamp=clamp)
    x = 2 * torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        a, b, C = system(mixer)
        h, clamped = torch.zeros(2, *a.shape, dtype=a.dtype), 0
        for t in range(T):
            u = x[:, t, :, None]
            decay = a + b * u
            size = decay.abs()
            clamped += int((size > 1).sum())
            if clamp:
                decay = torch.where(size > 1, decay / size, decay)
                assert decay.abs().max() <= 1 + 1e-12
            h = decay * h + b * u
            torch.testing.assert_close(y[:, t], (C * h).real.sum(-1) + mixer.skip * x[:, t], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state["memory"], h, atol=1e-10, rtol=1e-10)
    assert clamped > 10  # the clamp was put to the test


def test_exact_is_the_sum_over_all_subsets_of_inputs():
    """sum over i_1 < ... < i_p <= k of C a^(k - i_1 - (p - 1)) b^p u_{i_1} ... u_{i_p}, powers by element."""
    mixer = build(mode="exact", state_dim=4, clamp=False)
    x = torch.randn(1, 8, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        a, b, C = system(mixer)
        for k in range(8):
            expected = mixer.skip * x[0, k]
            for p in range(1, k + 2):
                for subset in itertools.combinations(range(k + 1), p):
                    product = x[0, list(subset)].prod(0)
                    kernel = (C * a ** (k - subset[0] - (p - 1)) * b**p).real.sum(-1)
                    expected = expected + kernel * product
            torch.testing.assert_close(y[0, k], expected, atol=1e-9, rtol=1e-9)


def test_a_long_run_of_large_inputs_stays_bounded():
    wild, tame = (build(mode="exact", state_dim=4, clamp=clamp) for clamp in (False, True))
    x = 5 * torch.randn(1, 400, D, dtype=torch.float64)
    with torch.no_grad():
        assert tame(x)[0].abs().max() < 1e5
        assert wild(x)[0].abs().max() > 1e10


# -- causal kernels ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["kb", "pb"])
@pytest.mark.parametrize("contraction", ["none", "tanh", "lecun"])
@pytest.mark.parametrize("degree", [2, 4])
def test_kernels_of_products_as_a_double_loop(mode, contraction, degree):
    mixer = build(mode=mode, degree=degree, contraction=contraction, state_dim=4)
    squash = {"none": lambda c: c, "tanh": torch.tanh, "lecun": lambda c: 1.7159 * torch.tanh(2 * c / 3)}[contraction]
    x = torch.randn(1, 12, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        a, b, C = system(mixer)
        for k in range(12):
            expected = mixer.skip * x[0, k]
            for p in range(1, degree + 1):
                for s in range(k + 1 if mode == "kb" or p == 1 else 1):
                    first = k - s - (p - 1)
                    if first < 0:  # zeros before the beginning
                        continue
                    product = x[0, first : k - s + 1].prod(0)
                    product = product if p == 1 else squash(product)
                    expected = expected + (C * b**p * a**s).real.sum(-1) * product
            torch.testing.assert_close(y[0, k], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", ["kb", "pb"])
def test_degree_one_is_s4d_bit_for_bit(mode):
    options = dict(state_dim=8, init="legs", rule="bilinear", dt_max=0.2)
    liquid, s4d = mixers.build("liquid-s4", D, mode=mode, degree=1, **options), mixers.build("s4d", D, **options)
    s4d.load_state_dict(liquid.state_dict())
    x = torch.randn(2, T, D)
    (y, state), (wanted, kept) = liquid(x), s4d(x)
    assert torch.equal(y, wanted)
    assert torch.equal(state["memory"], kept["memory"])


@pytest.mark.parametrize("mode", ["kb", "pb"])
def test_scaling_the_input_scales_each_order_by_its_power(mode):
    x = torch.randn(1, T, D, dtype=torch.float64)
    lower = build(mode=mode, degree=2, state_dim=4)
    higher = build(mode=mode, degree=3, state_dim=4)
    with torch.no_grad():
        third = [(higher(c * x)[0] - lower(c * x)[0]) for c in (1.0, 3.0)]
    torch.testing.assert_close(third[1], 27 * third[0], atol=1e-9, rtol=1e-9)
    assert third[0].abs().max() > 1e-3


# -- what it is for ----------------------------------------------------------------------------------------------------
def test_kb_can_be_a_recurrence_of_products():
    """y_t = 0.8 y_{t-1} + x_t x_{t-1} exactly: two states whose b are b and -b, so that the first order cancels."""
    mixer = mixers.build("liquid-s4", 1, mode="kb", state_dim=2, init="real", rule="zoh", output="none").double()
    with torch.no_grad():
        mixer.log_real.fill_(math.log(-math.log(0.8)))
        mixer.log_step.zero_()
        mixer.skip.zero_()
        scale = (1 - 0.8) / -math.log(0.8)  # of the discretisation
        mixer.input_weight.copy_(torch.tensor([[[1.0], [-1.0]]]) / scale)
        mixer.output_weight.fill_(0.5)
        x, y = products(4, torch.Generator().manual_seed(0), length=64, decay=0.8)
        torch.testing.assert_close(mixer(x.double())[0], y.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_a_linear_model_cannot_learn():
    """Normalised errors after 500 steps: linear 1, instantaneous products 1 - (1 - 0.8^2), kb nearly none."""

    def error(**options):
        torch.manual_seed(0)
        draw = torch.Generator().manual_seed(0)
        options = dict(state_dim=16, init="real", rule="zoh", dt_min=0.1, dt_max=0.1, output="none") | options
        mixer = mixers.build("liquid-s4", 1, **options)
        optimiser = torch.optim.Adam(mixer.parameters(), lr=1e-2)
        for _ in range(500):
            x, y = products(32, draw)
            optimiser.zero_grad()
            (mixer(x)[0] - y).square().mean().backward()
            optimiser.step()
        x, y = products(512, draw)
        with torch.no_grad():
            return float((mixer(x)[0] - y).square().mean() / y.square().mean())

    assert error(mode="kb", degree=1) > 0.95
    assert error(mode="exact") < 0.6
    assert error(mode="kb") < 0.05
    assert abs(error(mode="pb") - 0.64) < 0.05


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(mode="polyb"), "mode: seen 'polyb'"),
        (dict(degree=0), "degree: seen 0"),
        (dict(contraction="relu"), "contraction: seen 'relu'"),
        (dict(rule="trapezoid"), "rule: seen 'trapezoid'"),
        (dict(init="hippo"), "init: seen 'hippo'"),
        (dict(state_dim=3), "state_dim: seen 3"),
    ],
)
def test_errors_name_the_option(options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build("liquid-s4", 8, **options)

"""GSS and H3: the papers' recurrences, the same as convolutions and as attention, and their initialisations."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, registry
from tidegate.mixers.h3 import ShiftSSM

D, T = 8, 19
VARIANTS = [
    ("gss", dict(state_dim=5)),
    ("gss", dict(state_dim=3, imag="linear", bias=True, expand=1.5, narrow=0.5)),
    ("gss", dict(state_dim=4, imag="none")),
    ("h3", dict(state_dim=4, shift_dim=6)),
    ("h3", dict(head_dim=4, state_dim=4, shift_dim=30, init="legs", rule="bilinear")),
    ("h3", dict(head_dim=2, state_dim=3, shift="conv", shift_dim=4, init="real")),
    ("h3", dict(head_dim=8, state_dim=2, shift="none", rule="trapezoid")),
]


def variant(*names):
    chosen = [(name, options) for name, options in VARIANTS if not names or name in names]
    ids = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in chosen]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=ids)


def subject(name, options):
    return Subject(name, registry.info(name).cls, D, options)


# -- the contract, for the options that the tiny configuration leaves out ----------------------------------------------
@variant()
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(name, options, kind):
    case = subject(name, options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(name))
    if segments is not None:
        x[~segments.valid] = float("nan")
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), whole(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, range(1, T), segments), whole(mixer, segments), x, state)
    if segments is not None:
        assert (got.outputs["y"][~segments.valid] == 0).all()
    single, clean = case.build(torch.float32), x.nan_to_num()
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), clean, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


@variant()
def test_every_weight_matters_and_half_precision_keeps_a_wide_state(name, options):
    mixer = subject(name, options).build()
    mixer(torch.randn(2, 9, D, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    y, state = mixer.bfloat16()(torch.randn(2, 9, D).bfloat16())
    assert (y.dtype, state["memory"].dtype) == (torch.bfloat16, torch.complex64)


# -- GSS ---------------------------------------------------------------------------------------------------------------
def gss_parts(mixer, x):
    """u, v, eigenvalues and C of the paper's formulas."""
    first, second = mixer.in_proj.weight.split([mixer.gate_dim, mixer.inner_dim])
    bias = mixer.in_proj.bias if mixer.bias else torch.zeros(len(first) + len(second)).double()
    u = functional.gelu(x @ first.T + bias[: len(first)])
    v = functional.gelu(x @ second.T + bias[len(first) :])
    v = (v - v.mean(-1, keepdim=True)) / torch.sqrt(v.var(-1, correction=0, keepdim=True) + 1e-5)
    v = v * mixer.norm.weight + mixer.norm.bias
    imag = {"exp": torch.exp, "linear": lambda w: w}.get(mixer.imag, lambda w: 0 * mixer.log_real)(mixer.imag_parameter)
    C = mixer.output_weight
    C = torch.complex(C[..., 0], C[..., 1] if mixer.imag != "none" else 0 * C[..., 0])
    return u, v, torch.complex(-torch.exp(mixer.log_real), imag), C


@variant("gss")
def test_gss_equals_the_recurrence_and_the_convolution(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        u, v, eigenvalue, C = gss_parts(mixer, x)
        scale = (torch.exp(eigenvalue) - 1) / eigenvalue
        h, steps = torch.zeros(2, mixer.inner_dim, mixer.state_dim, dtype=C.dtype), []
        for t in range(T):
            h = torch.exp(eigenvalue) * h + scale * v[:, t, :, None]
            steps.append((C * h).real.sum(-1))
        recurrent = torch.stack(steps, 1)
        kernel = torch.stack([(C * scale * torch.exp(s * eigenvalue)).real.sum(-1) for s in range(T)])
        size = 2 * T - 1  # no power of two
        spectrum = torch.fft.rfft(kernel, n=size, dim=0) * torch.fft.rfft(v, n=size, dim=1)
        convolved = torch.fft.irfft(spectrum, n=size, dim=1)[:, :T]
        for z in (recurrent, convolved):
            expected = mixer.o_proj(u * mixer.up_proj(z + mixer.skip * v))
            torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)


def test_gss_initialisation_and_sizes():
    mixer = mixers.build("gss", 256, preset="paper")
    assert (mixer.state_dim, mixer.gate_dim, mixer.inner_dim) == (512, 1024, 64)
    for parameter in (mixer.log_real, mixer.imag_parameter, mixer.output_weight, mixer.skip):
        assert abs(float(parameter.detach().std()) - 1) < 4 * (2 * parameter.numel()) ** -0.5
    own = sum(p.numel() for p in mixer.parameters(recurse=False))
    assert own == 2 * 512 + 2 * 64 * 512 + 64  # all features share the eigenvalues
    decay = mixer.system()[0].detach().abs()
    assert abs(float(decay[0].median()) - math.exp(-1)) < 0.1
    assert 0.9 < float(decay.max()) < 1


# -- H3 ----------------------------------------------------------------------------------------------------------------
def shifted(mixer, k):
    """k' by the shift register itself, or by the filter of "conv"."""
    if mixer.key_shift is None:
        return k
    if mixer.shift == "conv":
        padded = functional.pad(k.transpose(1, 2), (mixer.shift_dim - 1, 0))
        return functional.conv1d(padded, mixer.key_shift.weight[:, None], groups=D).transpose(1, 2)
    B, C, skip = mixer.key_shift.input_weight, mixer.key_shift.output_weight, mixer.key_shift.skip
    s, steps = torch.zeros(k.shape[0], D, mixer.shift_dim, dtype=k.dtype), []
    for t in range(k.shape[1]):
        s = torch.cat([torch.zeros_like(s[..., :1]), s[..., :-1]], -1) + B * k[:, t, :, None]
        steps.append((C * s).sum(-1) + skip * k[:, t])
    return torch.stack(steps, 1)


def h3_parts(mixer, x):
    """q, k', v as (B, T, H, d), and the second model's kernel (T, H), the skip in its first tap."""
    q, k, v = (x @ mixer.qkv_proj.weight.T + mixer.qkv_proj.bias).chunk(3, -1)
    heads = (*x.shape[:2], D // mixer.head_dim, mixer.head_dim)
    impulse = torch.zeros(1, x.shape[1], heads[2]).double()
    impulse[:, 0] = 1
    kernel, _ = mixer.products(impulse)  # S4D has oracles of its own
    return q.view(heads), shifted(mixer, k).view(heads), v.view(heads), kernel[0]


@variant("h3")
def test_h3_equals_the_state_loop_and_attention_with_fixed_decays(name, options):
    mixer = subject(name, options).build()
    if mixer.shift == "ssm":
        with torch.no_grad():
            mixer.key_shift.input_weight.normal_()  # any B, not only the first unit vector
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        q, k, v, kernel = h3_parts(mixer, x)
        # 1. The state of every head: d x d numbers for each of S4D's states.
        decay, weight, skip = mixer.products.system()
        h, steps = torch.zeros(2, *q.shape[2:], q.shape[3], decay.shape[1], dtype=decay.dtype), []
        for t in range(T):
            product = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, d, d)
            h = decay[:, None, None] * h + product[..., None]
            s = (weight[:, None, None] * h).real.sum(-1) + skip[:, None, None] * product
            steps.append(torch.einsum("bhi,bhij->bhj", q[:, t], s).flatten(1))
        torch.testing.assert_close(y, mixer.o_proj(torch.stack(steps, 1)), atol=1e-10, rtol=1e-10)
        # 2. Scores q k' times a kernel of the distance, without normalisation.
        distance = torch.arange(T)[:, None] - torch.arange(T)
        decays = torch.where((distance >= 0)[..., None], kernel[distance.clamp(min=0)], 0)  # (T, T, H)
        scores = torch.einsum("bthi,bshi->btsh", q, k) * decays
        o = torch.einsum("btsh,bshj->bthj", scores, v).flatten(2)
        torch.testing.assert_close(y, mixer.o_proj(o), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("time", [3, 16, 40])
def test_the_shift_is_a_filter(time):
    """With B = (1, 0, 0, ...) it is C; with any B it is their correlation, also where the input is shorter."""
    shift = ShiftSSM(D, 16, dtype=torch.float64)
    x = torch.randn(2, time, D, dtype=torch.float64)
    with torch.no_grad():
        wanted = shift.output_weight.clone()
        wanted[:, 0] += shift.skip
        torch.testing.assert_close(shift.taps(), wanted, atol=1e-12, rtol=1e-12)
        shift.input_weight.normal_()
        B, C = shift.input_weight, shift.output_weight
        taps = torch.stack([(B[:, : 16 - s] * C[:, s:]).sum(1) for s in range(16)], 1)
        taps[:, 0] += shift.skip
        y, tail = shift(x, torch.zeros(2, 15, D).double())
        for t in range(time):
            expected = sum(taps[:, s] * x[:, t - s] for s in range(min(t + 1, 16)))
            torch.testing.assert_close(y[:, t], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(tail, functional.pad(x, (0, 0, 15, 0))[:, -15:])


def test_h3_initialisation():
    mixer = mixers.build("h3", 768, preset="125m")
    assert (mixer.num_heads, mixer.products.dim) == (96, 96)
    assert abs(float(mixer.qkv_proj.weight.detach().std()) - 0.02) < 0.002
    assert (mixer.key_shift.input_weight[:, 0] == 1).all()
    assert not mixer.key_shift.input_weight[:, 1:].any()
    assert 0.124 < float(mixer.key_shift.output_weight.detach().max()) <= 0.125
    torch.testing.assert_close(mixer.products.imag[3], math.pi * torch.arange(32))
    assert mixer.init_state(2)["memory"].shape == (2, 96 * 64, 32)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("gss", dict(state_dim=0), "state_dim: seen 0"),
        ("gss", dict(imag="free"), "imag: seen 'free'"),
        ("gss", dict(expand=0.3), "expand: 0.3"),
        ("gss", dict(narrow=0.01), "narrow: 0.01"),
        ("h3", dict(head_dim=3), "head_dim: seen 3"),
        ("h3", dict(head_dim=0), "head_dim: seen 0"),
        ("h3", dict(shift="fir"), "shift: seen 'fir'"),
        ("h3", dict(shift_dim=0), "shift_dim: seen 0"),
        ("h3", dict(state_dim=5), "state_dim: seen 5"),
        ("h3", dict(dt_min=1.0), "dt_min, dt_max"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, 8, **options)

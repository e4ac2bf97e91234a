"""S4D, DSS, S5: the papers' recurrences, their convolution forms, their initialisations, and each other."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, registry
from tidegate.nn.hippo import nplr
from tidegate.nn.state_space import discretise

D, T = 6, 17
VARIANTS = [
    *(("s4d", dict(init=init, state_dim=6)) for init in ("legs", "lin", "inv", "real", "quad", "rand")),
    ("s4d", dict(rule="bilinear", state_dim=2, num_systems=2, output="linear")),
    ("s4d", dict(rule="dirac", state_dim=4, output="none", step_rescale=0.5)),
    ("s4d", dict(rule="trapezoid", state_dim=4, num_systems=2, output="none")),
    ("s4d", dict(init="real", rule="trapezoid", state_dim=3, output="linear")),
    ("s4d", dict(init="legs", state_dim=4, freeze_input=True, step_per_state=True)),
    *(("dss", dict(form=form, state_dim=5, length=40)) for form in ("softmax", "exp", "exp-no-scale")),
    ("dss", dict(init="random", state_dim=3, length=5, separate_steps=False, output="glu")),
    ("dss", dict(init="random", form="exp", state_dim=2, output="none")),
    ("s5", dict()),
    ("s5", dict(state_dim=8, blocks=2, rule="bilinear", c_init="complex_normal", clip_eigenvalues=True)),
    ("s5", dict(state_dim=9, blocks=3, conjugate_symmetry=False, c_init="lecun_normal", step_rescale=2.0)),
]


def variant(*names):
    chosen = [(name, options) for name, options in VARIANTS if not names or name in names]
    ids = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in chosen]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=ids)


def subject(name, options):
    return Subject(name, registry.info(name).cls, D, options)


def convolve(x, kernel):
    """y_t = sum_s K_{t-s} x_s by FFT; kernel (T, D), or (T, D, D) as out, in."""
    size = 2 * x.shape[1]
    kernel, x = torch.fft.rfft(kernel, n=size, dim=0), torch.fft.rfft(x, n=size, dim=1)
    spectrum = torch.einsum("foi,bfi->bfo", kernel, x) if kernel.ndim == 3 else kernel * x
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, : size // 2]


def mapped(mixer, z):
    """The output map, written out."""
    if mixer.output == "none":
        return z
    proj = mixer.output_map.proj
    y = functional.gelu(z) @ proj.weight.T + proj.bias
    return y if mixer.output == "linear" else y[..., :D] * torch.sigmoid(y[..., D:])


# -- the parts ---------------------------------------------------------------------------------------------------------
def test_discretisation_is_the_solution_over_one_step():
    real, imag = torch.tensor([-0.5, -3.0, 0.2, -1e-9]).double(), torch.tensor([20.0, 0.0, -1.0, 1e-9]).double()
    for step in (1e-9, 1e-4, 0.1, 0.5):
        decay, scale = discretise(real, imag, torch.tensor(step, dtype=torch.float64))
        eigenvalue = torch.complex(real, imag)
        # h' = l h + u with u constant, by series: sum (l step)^k / k! and step * sum (l step)^k / (k + 1)!.
        terms = torch.stack([(eigenvalue * step) ** k / math.gamma(k + 1) for k in range(80)])
        shorter = torch.stack([step * (eigenvalue * step) ** k / math.gamma(k + 2) for k in range(80)])
        torch.testing.assert_close(decay, terms.sum(0), atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(scale / step, shorter.sum(0) / step, atol=1e-11, rtol=1e-9)
        single = discretise(real.float(), imag.float(), torch.tensor(step))[1].to(scale.dtype)
        torch.testing.assert_close(single / step, scale / step, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(discretise(real, imag, torch.tensor(step, dtype=torch.float64), "dirac")[0], decay)
    # The bilinear rule agrees to second order in the step.
    for step in (1e-3, 1e-4):
        exact = torch.stack(discretise(real, imag, torch.tensor(step)))
        other = torch.stack(discretise(real, imag, torch.tensor(step), "bilinear"))
        error = (exact - other).abs() / torch.tensor([[1.0], [step]])
        assert error.max() < 4000 * step**2
    with pytest.raises(ValueError, match="rule: seen 'euler'"):
        discretise(real, imag, torch.tensor(1.0), "euler")


# -- the contract, for the options that the tiny configuration leaves out ----------------------------------------------
@variant()
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(name, options, kind):
    case = subject(name, options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(name))
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), alone(mixer, segments), x, state)
    if segments is not None:
        assert (got.outputs["y"][~segments.valid] == 0).all()
    single = case.build(torch.float32)
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), x, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


@variant()
def test_every_weight_matters_and_half_precision_keeps_a_wide_state(name, options):
    mixer = subject(name, options).build()
    mixer(torch.randn(2, 9, D, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())
    y, state = mixer.bfloat16()(torch.randn(2, 9, D).bfloat16())
    assert (y.dtype, state["memory"].dtype) == (torch.bfloat16, torch.complex64)


# -- S4D ---------------------------------------------------------------------------------------------------------------
def s4d_system(mixer):
    """Discrete decay and input, C, and the factor of the read-out, channel by channel from the paper's formulas."""
    copies = D // mixer.log_real.shape[0]
    imag = torch.zeros_like(mixer.log_real) if mixer.imag is None else mixer.imag
    A = torch.complex(-torch.exp(mixer.log_real), imag).repeat(copies, 1)
    B, C = (
        torch.view_as_complex(functional.pad(w, (0, 2 - w.shape[-1])).contiguous())
        for w in (mixer.input_weight, mixer.output_weight)
    )
    step, B = mixer.step_rescale * torch.exp(mixer.log_step).reshape(D, -1), B.repeat(copies, 1)
    factor = 1 if mixer.imag is None else 2
    if mixer.rule == "bilinear":
        return (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2) * B, C, factor
    decay = torch.exp(step * A)
    if mixer.rule == "trapezoid":
        return decay, step / 2 * B, C, factor  # of this input, and decay times as much of the one before
    return decay, B if mixer.rule == "dirac" else (decay - 1) / A * B, C, factor


@variant("s4d")
def test_s4d_equals_the_recurrence_and_the_convolution(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        decay, taken, C, factor = s4d_system(mixer)
        h, steps = torch.zeros(2, *decay.shape, dtype=decay.dtype), []
        both_ends = mixer.rule == "trapezoid"
        for t in range(T):
            h = decay * h + taken * x[:, t, :, None]
            if both_ends and t:
                h = h + decay * taken * x[:, t - 1, :, None]
            steps.append(factor * (C * h).real.sum(-1) + mixer.skip * x[:, t])
        torch.testing.assert_close(y, mapped(mixer, torch.stack(steps, 1)), atol=1e-10, rtol=1e-10)
        kernel = factor * (C * taken * decay ** torch.arange(T)[:, None, None]).real.sum(-1)
        if both_ends:
            kernel[1:] *= 2
        torch.testing.assert_close(y, mapped(mixer, convolve(x, kernel) + mixer.skip * x), atol=1e-10, rtol=1e-10)


def test_s4d_initialisation():
    n = torch.arange(4)
    imaginary = {
        "lin": math.pi * n,
        "inv": 8 / math.pi * (8 / (2 * n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / math.pi,
        "legs": nplr("legs", 8)[0].imag[:4].float(),
    }
    for init, wanted in imaginary.items():
        mixer = mixers.build("s4d", 512, state_dim=8, init=init)
        torch.testing.assert_close(mixer.imag[3], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.exp(mixer.log_real), torch.full((512, 4), 0.5))
        assert abs(float(mixer.output_weight.detach().var()) - 0.5) < 0.05
        step = torch.exp(mixer.log_step.detach())
        assert 1e-3 <= step.min() < 1.5e-3
        assert 0.07 < step.max() <= 0.1
        if init != "legs":
            assert (torch.view_as_complex(mixer.input_weight.detach()) == 1).all()
    real = mixers.build("s4d", 512, state_dim=8, init="real")
    torch.testing.assert_close(torch.exp(real.log_real)[0], torch.arange(1.0, 9.0))
    assert abs(float(real.output_weight.detach().var()) - 1) < 0.1
    frozen = mixers.build("s4d", 8, freeze_input=True)
    assert "input_weight" not in dict(frozen.named_parameters())
    assert "input_weight" in frozen.state_dict()


# -- DSS ---------------------------------------------------------------------------------------------------------------
@variant("dss")
def test_dss_equals_the_recurrence_and_the_convolution(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        real = mixer.real.clamp(max=-1e-4) if mixer.form == "softmax" else -torch.exp(mixer.real)
        eigenvalue, step = torch.complex(real, mixer.imag), torch.exp(mixer.log_step)
        z = torch.complex(step[:, :1] * real, step[:, -1:] * mixer.imag)  # (D, N)
        w = torch.view_as_complex(mixer.output_weight)
        if mixer.form == "softmax":  # over s = 0 ... L - 1, and what comes after goes on in the same way
            total = torch.exp(z * torch.arange(mixer.length)[:, None, None]).sum(0)
            w = w / eigenvalue / total
        elif mixer.form == "exp":
            w = w / eigenvalue * (torch.exp(z) - 1)
        kernel = (w * torch.exp(z * torch.arange(T)[:, None, None])).real.sum(-1)
        # The regularised reciprocal, 1e-7 beside |e^(L z) - 1|^2, is what the definition has not.
        close = dict(atol=1e-5, rtol=1e-5) if mixer.form == "softmax" else dict(atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(y, mapped(mixer, convolve(x, kernel) + mixer.skip * x), **close)
        decay, weight = mixer.system()
        h = torch.zeros(2, *z.shape, dtype=z.dtype)
        for t in range(T):
            h = torch.exp(z) * h + x[:, t, :, None]
            expected = mapped(mixer, (weight * h).real.sum(-1) + mixer.skip * x[:, t])
            torch.testing.assert_close(y[:, t], expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state["memory"], h, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(decay, torch.exp(z))
        torch.testing.assert_close(weight, w, **close)


def test_dss_softmax_weights_sum_to_one():
    """At the length it is normalised over, a constant input is read as Re sum_n w_n / l_n."""
    mixer = mixers.build("dss", D, state_dim=4, length=33, output="none", dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(torch.ones(1, 33, D, dtype=torch.float64))
        eigenvalue = torch.complex(mixer.real, mixer.imag)
        expected = (torch.view_as_complex(mixer.output_weight) / eigenvalue).real.sum(-1) + mixer.skip
        torch.testing.assert_close(y[0, -1], expected, atol=1e-3, rtol=1e-3)


def test_dss_initialisation():
    mixer = mixers.build("dss", 512)
    w = nplr("legs", 128)[0].imag[64:]
    assert (w > 0).all()
    torch.testing.assert_close(mixer.imag, w.float())
    assert (mixer.real == -0.5).all()
    torch.testing.assert_close(-torch.exp(mixers.build("dss", 8, form="exp").real), torch.full((64,), -0.5))
    assert abs(float(mixer.output_weight.detach().std()) - 1) < 0.02
    assert mixer.log_step.shape == (512, 2)


# -- S5 ----------------------------------------------------------------------------------------------------------------
def s5_system(mixer):
    real = mixer.eigenvalue_real.clamp(max=-1e-4) if mixer.clip_eigenvalues else mixer.eigenvalue_real
    B = torch.complex(mixer.input_weight[:, 0], mixer.input_weight[:, 1])
    C = torch.complex(mixer.output_weight[..., 0], -mixer.output_weight[..., 1])
    step = mixer.step_rescale * torch.exp(mixer.log_step)
    return torch.complex(real, mixer.eigenvalue_imag), B, C * (2 if mixer.conjugate_symmetry else 1), step


def s5_discrete(mixer, A, step):
    if mixer.rule == "bilinear":
        return (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2)
    return torch.exp(step * A), (torch.exp(step * A) - 1) / A


@variant("s5")
@pytest.mark.parametrize("irregular", [False, True])
def test_s5_equals_the_recurrence_and_the_convolution(name, options, irregular):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    gaps = torch.rand(2, T, dtype=torch.float64) * 3 if irregular else None
    with torch.no_grad():
        y, state = mixer(x, gaps=gaps)
        A, B, C, step = s5_system(mixer)
        h = torch.zeros(2, len(A), dtype=A.dtype)
        for t in range(T):
            decay, scale = s5_discrete(mixer, A, step if gaps is None else gaps[:, t, None] * step)
            h = decay * h + scale * (x[:, t].to(B.dtype) @ B.T)
            expected = (h @ C.T).real + mixer.skip * x[:, t]
            torch.testing.assert_close(y[:, t], expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state["memory"], h, atol=1e-10, rtol=1e-10)
        if gaps is None:
            decay, scale = s5_discrete(mixer, A, step)
            powers = decay ** torch.arange(T)[:, None]
            kernel = torch.einsum("on,sn,n,ni->soi", C, powers, scale, B).real
            torch.testing.assert_close(y, convolve(x, kernel) + mixer.skip * x, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(mixer(x, gaps=torch.ones(2, T))[0], y)


def test_s5_time_is_time():
    """Holding an input for three steps is one step with a gap of three; steps twice as long are gaps of two."""
    mixer = mixers.build("s5", D, dtype=torch.float64)
    x = torch.randn(1, 5, D, dtype=torch.float64)
    slow = mixers.build("s5", D, step_rescale=2.0, dtype=torch.float64)
    slow.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        held, _ = mixer(x.repeat_interleave(3, 1))
        gaps = torch.full((1, 5), 3.0)
        torch.testing.assert_close(mixer(x, gaps=gaps)[0], held[:, 2::3], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(mixer(x, gaps=gaps / 1.5)[0], slow(x)[0])
    with pytest.raises(ValueError, match="gaps: seen shape"):
        mixer(x, gaps=torch.ones(1, 4))


def test_s5_with_one_state_per_pair_and_diagonal_input_is_s4d():
    """S4D's channels side by side are one S5 whose B and C are block-diagonal."""
    states = 4
    s4d = subject("s4d", dict(state_dim=2 * states, output="none")).build()
    s5 = mixers.build("s5", D, state_dim=2 * states * D, dtype=torch.float64)
    with torch.no_grad():
        eye = torch.eye(D).double().repeat_interleave(states, 0)  # (D * states, D)
        s5.eigenvalue_real.copy_(-torch.exp(s4d.log_real).flatten())
        s5.eigenvalue_imag.copy_(s4d.imag.flatten())
        s5.log_step.copy_(s4d.log_step.repeat_interleave(states))
        s5.input_weight.copy_((s4d.input_weight.flatten(0, 1)[:, None] * eye[..., None]).transpose(1, 2))
        read = s4d.output_weight * torch.tensor([1.0, -1.0])
        s5.output_weight.copy_((read.flatten(0, 1)[:, None] * eye[..., None]).transpose(0, 1))
        s5.skip.copy_(s4d.skip)
        x = torch.randn(2, T, D, dtype=torch.float64)
        torch.testing.assert_close(s5(x)[0], s4d(x)[0], atol=1e-10, rtol=1e-10)


def test_s5_initialisation():
    P, dim, blocks = 128, 192, 4
    mixer = mixers.build("s5", dim, state_dim=P, blocks=blocks, dtype=torch.float64)
    eigenvalues, _, _, vectors = nplr("legs", P // blocks)
    w = eigenvalues.imag[: P // blocks // 2]
    assert (w < 0).all()
    torch.testing.assert_close(mixer.eigenvalue_imag.detach(), w.repeat(blocks))
    assert (mixer.eigenvalue_real == -0.5).all()
    # B and C are real matrices of the given variance in the basis of the eigenvectors.
    basis = torch.block_diag(*[vectors[:, : P // blocks // 2]] * blocks)
    B = torch.complex(mixer.input_weight[:, 0], mixer.input_weight[:, 1]).detach()
    real = 2 * (basis @ B).real
    assert abs(float(real.var()) * P - 1) < 0.03
    assert float(real.abs().max()) <= 2 * P**-0.5 / 0.8796 + 1e-6
    for c_init, variance in (("trunc_standard_normal", 1 / P), ("lecun_normal", 1 / P / dim), ("complex_normal", 0.5)):
        C = mixers.build("s5", dim, state_dim=P, blocks=blocks, c_init=c_init).output_weight.detach()
        assert abs(float(C.var()) / variance - 1) < 0.05


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("s4d", dict(init="hippo"), "init: seen 'hippo'"),
        ("s4d", dict(state_dim=5), "state_dim: seen 5"),
        ("s4d", dict(rule="euler"), "rule: seen 'euler'"),
        ("s4d", dict(dt_min=0.2), "dt_min, dt_max: seen 0.2"),
        ("s4d", dict(step_rescale=0.0), "step_rescale: seen 0"),
        ("s4d", dict(num_systems=3), "num_systems: seen 3"),
        ("s4d", dict(output="mlp"), "output: seen 'mlp'"),
        ("dss", dict(form="linear"), "form: seen 'linear'"),
        ("dss", dict(length=0), "length: seen 0"),
        ("dss", dict(init="lin"), "init: seen 'lin'"),
        ("dss", dict(state_dim=0), "state_dim: seen 0"),
        ("dss", dict(dt_max=0.0), "dt_min, dt_max"),
        ("s5", dict(state_dim=7), "state_dim: 7 states"),
        ("s5", dict(blocks=0), "state_dim: 8 states in 0 blocks"),
        ("s5", dict(rule="dirac"), "rule: seen 'dirac'"),
        ("s5", dict(c_init="zeros"), "c_init: seen 'zeros'"),
        ("s5", dict(dt_min=0.0), "dt_min, dt_max"),
        ("s5", dict(step_rescale=-1.0), "step_rescale: seen -1"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, 8, **options)

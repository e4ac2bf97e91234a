"""S4 and LSSL: the papers' recurrences, their kernels, what they start as, and what time means to them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, ops, registry
from tidegate.nn.hippo import nplr, transition

D, T = 6, 17
VARIANTS = [
    ("s4", dict(state_dim=6)),
    ("s4", dict(state_dim=6, init="legt", num_systems=2)),
    ("s4", dict(state_dim=4, init="fout", channels=3, output="linear")),
    ("s4", dict(state_dim=4, init="hippo", num_systems=2, step_rescale=0.5)),
    ("s4", dict(state_dim=2, init="dplr", rank=3, num_systems=None, output="none")),
    ("s4", dict(state_dim=6, init="legs", rank=2)),
    ("lssl", dict(state_dim=5)),
    ("lssl", dict(state_dim=4, measure="legt", rule="backward", channels=2, output="glu")),
    ("lssl", dict(state_dim=4, measure="fout", rule="zoh", output="none")),
    ("lssl", dict(state_dim=3, measure="lagt", rule=0.25, per_channel=True)),
    ("lssl", dict(state_dim=3, measure="random", rule="forward", step_rescale=2.0)),
    *(("lssl", dict(state_dim=5, measure=measure, structured=True)) for measure in ("legs", "legt", "lagt")),
    ("lssl", dict(state_dim=3, structured=True, per_channel=True)),
]


def variant(*names):
    chosen = [(name, options) for name, options in VARIANTS if not names or name in names]
    ids = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in chosen]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=ids)


def subject(name, options):
    return Subject(name, registry.info(name).cls, D, options)


def mapped(mixer, z):
    """The outputs (B, T, D, channels), with x * skip in them, through GELU and W."""
    z = z.flatten(2)
    if mixer.output == "none":
        return z
    proj = mixer.output_map.proj
    y = functional.gelu(z) @ proj.weight.T + proj.bias
    return y if mixer.output == "linear" else y[..., :D] * torch.sigmoid(y[..., D:])


def loop(x, skip, a, b, c):
    """h_t = a_t h_{t-1} + b_t x_t, z_t = Re(c h_t) + skip x_t, with (a_t, b_t) from functions of t."""
    h, z = torch.zeros(*x.shape[:1], *c.shape[::2], dtype=c.dtype), []
    for t in range(x.shape[1]):
        h = torch.einsum("bdij,bdj->bdi", a(t).expand(len(x), -1, -1, -1), h) + b(t) * x[:, t, :, None]
        z.append(torch.einsum("dmn,bdn->bdm", c, h).real + skip * x[:, t, :, None])
    return torch.stack(z, 1), h


# -- the contract, for the options that the tiny configurations leave out ----------------------------------------------
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
def test_every_weight_matters_as_it_starts(name, options):
    mixer = mixers.build(name, D, **options, dtype=torch.float64)
    mixer(torch.randn(2, 9, D, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


# -- S4 ----------------------------------------------------------------------------------------------------------------
def number(x):
    return torch.view_as_complex(x.detach())


def s4_system(mixer):
    """A, B and C of all N states, from the paper's formulas and the parameters, for every channel; and the steps."""
    copies = D // mixer.log_real.shape[0]
    real, imag = -torch.exp(mixer.log_real), mixer.imag
    eigenvalues = torch.cat([torch.complex(real, imag), torch.complex(real, -imag)], -1)
    P, B, C = (
        torch.cat([w, w.conj()], -1) for w in map(number, (mixer.low_rank, mixer.input_weight, mixer.output_weight))
    )
    A = torch.diag_embed(eigenvalues) - torch.einsum("srn,srm->snm", P, P.conj())
    step = mixer.step_rescale * torch.exp(mixer.log_step)
    return A.repeat(copies, 1, 1), B.repeat(copies, 1), C, step


@variant("s4")
def test_s4_equals_the_recurrence_of_all_states(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        A, B, C, step = s4_system(mixer)
        half = step[:, None, None] / 2 * A
        one = torch.eye(A.shape[-1], dtype=A.dtype)
        a, b = torch.linalg.solve(one - half, one + half), torch.linalg.solve(one - half, step[:, None] * B)
        z, h = loop(x.to(A.dtype), mixer.skip, lambda t: a, lambda t: b, C)
        torch.testing.assert_close(y, mapped(mixer, z.real), atol=1e-10, rtol=1e-10)
        memory = torch.cat([h.real, h.imag], -1).unflatten(-1, (2, 2, -1))[..., 0, :].flatten(-2)
        torch.testing.assert_close(state["memory"], memory, atol=1e-10, rtol=1e-10)


@variant("s4")
@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_s4_kernel_is_that_of_the_powers(name, options, length):
    mixer = subject(name, options).build()
    x = torch.randn(2, length, D, dtype=torch.float64)
    with torch.no_grad():
        a, b, c = mixer.discretised()
        taps = []
        for _ in range(length):
            taps.append(torch.einsum("dmn,dn->dm", c, b))
            b = torch.einsum("dij,dj->di", a, b)
        torch.testing.assert_close(mixer.kernel(length), torch.stack(taps, -1), atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(mixer.convolve(x), mixer(x)[0], atol=1e-10, rtol=1e-9)


def test_s4_kernel_is_exact_beyond_a_block_of_frequencies_and_for_default_sizes():
    mixer = mixers.build("s4", 4)
    x = torch.randn(1, 1500, 4)
    with torch.no_grad():
        double = mixers.build("s4", 4, dtype=torch.float64)
        double.load_state_dict(mixer.state_dict())
        wanted = double(x.double())[0]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(mixer.convolve(x).double(), wanted, atol=2e-6 * scale, rtol=0)
        torch.testing.assert_close(mixer(x)[0].double(), wanted, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("init", ["legs", "legt", "fout", "dplr"])
def test_s4_lets_no_state_grow(init):
    """However large its weights are: A + A^* is negative, so that the bilinear rule shrinks every state."""
    mixer = mixers.build("s4", D, init=init, state_dim=8, dt_max=10.0, dtype=torch.float64)
    with torch.no_grad():
        for weight in (mixer.log_real, mixer.imag, mixer.low_rank, mixer.log_step):
            weight.add_(2 * torch.randn_like(weight))
        a, _, _ = mixer.discretised()
    assert torch.linalg.matrix_norm(a, 2).max() <= 1 + 1e-12


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_s4_starts_as_hippo(measure):
    N = 10
    mixer = mixers.build("s4", D, init=measure, state_dim=N, dtype=torch.float64)
    with torch.no_grad():
        A, B, _, _ = s4_system(mixer)
        V = nplr(measure, N)[3][:, : N // 2]
        V = torch.cat([V, V.conj()], 1)
        wanted = transition(measure, N)[0]
        # Eigenvalues on the imaginary axis are moved off it a little.
        torch.testing.assert_close(
            (V @ A[0] @ V.mH).real, wanted, atol=1e-9 if measure == "legs" else 1.1e-4, rtol=1e-9
        )
        write = nplr(measure, N)[2][: N // 2]
        torch.testing.assert_close(B[0, : N // 2].real, write.real)
        torch.testing.assert_close(B[0, : N // 2].imag, write.imag.clamp(-2, 2))
    large = mixers.build("s4", 512, state_dim=8, init=measure)
    assert abs(float(large.output_weight.detach().var()) - 0.5) < 0.05
    assert abs(float(large.skip.detach().std()) - 1) < 0.1
    step = torch.exp(large.log_step.detach())
    assert 1e-3 <= step.min() < 1.5e-3
    assert 0.07 < step.max() <= 0.1


def test_s4_mixed_inits():
    mixer = mixers.build("s4", 8, state_dim=6, init="hippo", num_systems=4, dtype=torch.float64)
    for half, measure in ((slice(2), "legs"), (slice(2, 4), "fout")):
        imag = nplr(measure, 6)[0].imag[:3].expand(2, 3)
        torch.testing.assert_close(mixer.imag.detach()[half], imag)


# -- LSSL --------------------------------------------------------------------------------------------------------------
def lssl_matrices(mixer, step):
    """The generalised bilinear rule, or the exact solution for an input that is held, for steps (..., D)."""
    A, B, _ = (part.detach() for part in mixer.continuous())
    one, step = torch.eye(A.shape[-1], dtype=A.dtype), step[..., None, None]
    if mixer.rule == "zoh":
        a = torch.linalg.matrix_exp(step * A)
        return a, torch.linalg.solve(A, (a - one) @ B[..., None])[..., 0]
    alpha = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}.get(mixer.rule, mixer.rule)
    left = torch.linalg.inv(one - alpha * step * A)
    return left @ (one + (1 - alpha) * step * A), (left @ (step * B[..., None]))[..., 0]


@variant("lssl")
@pytest.mark.parametrize("irregular", [False, True])
def test_lssl_equals_the_recurrence(name, options, irregular):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    gaps = torch.rand(2, T, dtype=torch.float64) * 3 if irregular else None
    with torch.no_grad():
        y, state = mixer(x, gaps=gaps)
        step = mixer.step_rescale * torch.exp(mixer.log_step)
        steps = step.expand(2, T, D) if gaps is None else gaps[..., None] * step
        a, b = lssl_matrices(mixer, steps)
        z, h = loop(x, mixer.skip, lambda t: a[:, t], lambda t: b[:, t], mixer.output_weight)
        torch.testing.assert_close(y, mapped(mixer, z), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state["memory"], h, atol=1e-10, rtol=1e-10)
        if gaps is None:
            torch.testing.assert_close(mixer(x, gaps=torch.ones(2, T))[0], y)


@pytest.mark.parametrize(("rule", "order"), [("forward", 1), ("backward", 1), ("bilinear", 2), ("zoh", None)])
def test_lssl_simulates_its_equation(rule, order):
    """After a unit of constant input h is A^-1 (exp(A) - 1) B: exactly for "zoh", else to the rule's order."""
    errors = []
    for tokens in (64, 128):  # of that unit
        mixer = mixers.build("lssl", 1, state_dim=4, rule=rule, output="none", dtype=torch.float64)
        with torch.no_grad():
            mixer.log_step.fill_(-math.log(tokens))
            A, B = (part[0] for part in mixer.continuous()[:2])
            wanted = torch.linalg.solve(A, (torch.linalg.matrix_exp(A) - torch.eye(4)) @ B)
            _, state = mixer(torch.ones(1, tokens, 1, dtype=torch.float64))
            errors.append(float((state["memory"][0, 0] - wanted).abs().max()))
    if order is None:
        assert max(errors) < 1e-12
    else:
        assert errors[1] < 0.02
        assert 0.8 * 2**order < errors[0] / errors[1] < 1.25 * 2**order


def test_a_sigmoid_gate_is_a_step():
    """Lemma 3.1: A = -1, B = 1, backward rule, steps exp(v): h_t = (1 - sigmoid(v)) h_{t-1} + sigmoid(v) x_t."""
    mixer = mixers.build("lssl", D, state_dim=1, rule="backward", output="none", dtype=torch.float64)
    v, x = torch.randn(2, T).double(), torch.randn(2, T, D).double()
    with torch.no_grad():
        mixer.transition.fill_(-1)
        mixer.input_weight.fill_(1)
        mixer.output_weight.fill_(1)
        mixer.skip.zero_()
        mixer.log_step.zero_()
        gate = torch.sigmoid(v)[..., None].expand(2, T, D)
        wanted, _ = ops.scan(1 - gate, gate * x)
        torch.testing.assert_close(mixer(x, gaps=torch.exp(v))[0], wanted, atol=1e-12, rtol=1e-12)
        # And the same with a gate that does not depend on time, through the ordinary path.
        mixer.log_step.fill_(0.3)
        constant = torch.full_like(gate, torch.sigmoid(torch.tensor(0.3)).item())
        torch.testing.assert_close(mixer(x)[0], ops.scan(1 - constant, constant * x)[0], atol=1e-6, rtol=1e-6)


def test_lssl_time_is_time():
    """Holding an input for three steps is one step with a gap of three; steps twice as long are gaps of two."""
    options = dict(state_dim=4, rule="zoh", output="none", dtype=torch.float64)
    mixer, slow = mixers.build("lssl", D, **options), mixers.build("lssl", D, step_rescale=2.0, **options)
    slow.load_state_dict(mixer.state_dict())
    x, gaps = torch.randn(1, 5, D, dtype=torch.float64), torch.full((1, 5), 3.0)
    with torch.no_grad():
        held, _ = mixer(x.repeat_interleave(3, 1))
        torch.testing.assert_close(mixer(x, gaps=gaps)[0], held[:, 2::3], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(mixer(x, gaps=gaps / 1.5)[0], slow(x)[0])
    with pytest.raises(ValueError, match="gaps: seen shape"):
        mixer(x, gaps=torch.ones(1, 4))


def test_lssl_gaps_keep_documents_apart():
    case = subject("lssl", dict(state_dim=3))
    mixer, x = case.build(), case.input(3, T)
    gaps = torch.rand(3, T, dtype=torch.float64) * 2
    for kind in ("packed_with_holes", "left"):
        segments = segments_of(kind, 3, T, random.Random(kind))
        given = gaps.masked_fill(~segments.valid, torch.nan)
        y, last = mixer(x, gaps=given, segments=segments)
        for row in range(3):
            starts, valid = segments.starts[row], segments.valid[row]
            documents = segments.documents[row]
            for document in documents[valid].unique():
                own = torch.nonzero(valid & (documents == document)).flatten()
                alone_y, alone_last = mixer(x[row : row + 1, own], gaps=gaps[row : row + 1, own])
                torch.testing.assert_close(y[row, own], alone_y[0])
            assert starts.sum() <= len(documents.unique())
            torch.testing.assert_close(last["memory"][row], alone_last["memory"][0])
        assert (y[~segments.valid] == 0).all()


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("N", [1, 2, 9, 32])
def test_the_structured_matrix_starts_as_hippo(measure, N):
    mixer = mixers.build("lssl", 2, state_dim=N, measure=measure, structured=True, dtype=torch.float64)
    A, B, _ = (part.detach() for part in mixer.continuous())
    wanted = transition(measure, N)
    torch.testing.assert_close(A[0], wanted[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(B[0], wanted[1])


def test_lssl_initialisation_and_what_is_trained():
    mixer = mixers.build("lssl", 512, state_dim=8, channels=2)
    assert abs(float(mixer.output_weight.detach().std()) - 1) < 0.05
    assert abs(float(mixer.skip.detach().std()) - 1) < 0.1
    step = torch.exp(mixer.log_step.detach())
    assert 1e-3 <= step.min() < 1.5e-3
    assert 0.07 < step.max() <= 0.1
    fixed = registry.build("lssl", 8, preset="fixed")
    assert {name for name, _ in fixed.named_parameters()} == {
        *("output_weight", "skip", "output_map.proj.weight", "output_map.proj.bias")
    }
    assert {"transition", "input_weight", "log_step"} <= set(fixed.state_dict())


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("s4", dict(init="lagt"), "init: seen 'lagt'"),
        ("s4", dict(state_dim=5), "state_dim: seen 5"),
        ("s4", dict(init="legt", rank=1), "rank: seen 1"),
        ("s4", dict(num_systems=3), "num_systems: seen 3"),
        ("s4", dict(init="hippo"), "num_systems: seen 1, wanted an even number"),
        ("s4", dict(dt_min=0.2), "dt_min, dt_max: seen 0.2"),
        ("s4", dict(step_rescale=0.0), "step_rescale: seen 0"),
        ("s4", dict(output="mlp"), "output: seen 'mlp'"),
        ("s4", dict(channels=0), "channels: seen 0"),
        ("s4", dict(channels=2, output="none"), "channels: seen 2 outputs per channel, wanted 1"),
        ("lssl", dict(measure="legendre"), "measure: seen 'legendre'"),
        ("lssl", dict(measure="fout", structured=True), "measure: seen 'fout', wanted one of legs, legt, lagt with"),
        ("lssl", dict(measure="fout", state_dim=3), "state_dim: seen 3"),
        ("lssl", dict(rule="euler"), "rule: seen 'euler'"),
        ("lssl", dict(rule=1.5), "rule: seen 1.5"),
        ("lssl", dict(dt_max=0.0), "dt_min, dt_max"),
        ("lssl", dict(step_rescale=-1.0), "step_rescale: seen -1"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, 8, **options)

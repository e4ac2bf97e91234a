"""Online projection: the paper's recursion step by step, documents and splits, and signals that come back."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import Segments, mixers
from tidegate.nn.hippo import discretise_dense, transition
from tidegate.nn.projection import Projection
from tidegate.nn.state_space import discretise
from tidegate.ops import scan
from tidegate.tasks.signals import delay, white_signal

D, T = 3, 21
VARIANTS = [
    dict(),
    dict(rule="backward"),
    dict(rule="zoh"),
    dict(rule=0.7),
    dict(measure="legt", step=0.2),
    dict(measure="fout", step=0.1, rule="zoh"),
    dict(measure="legs", step=0.05, rule="backward"),
    dict(measure="lagt", step=0.1, rule="forward"),
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))


class Read(Projection):
    """Coefficients read by a vector, so that outputs have a mixer's shape."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, self.states, dtype=options["dtype"]))

    def forward(self, x, state=None, *, segments=None, gaps=None):
        coefficients, state = super().forward(x, state, segments=segments, gaps=gaps)
        return coefficients @ self.weight, state


def read(options):
    return Subject("hippo", Read, D, {"states": 8, **options})


# -- the recursion -----------------------------------------------------------------------------------------------------
@variants
@pytest.mark.parametrize("irregular", [False, True])
def test_equals_the_recursion_written_out(options, irregular):
    project = Projection(D, states=8, **options, dtype=torch.float64)
    u = torch.randn(2, T, D, dtype=torch.float64)
    gaps = torch.rand(2, T, dtype=torch.float64) + 0.5 if irregular else torch.ones(2, T, dtype=torch.float64)
    got, state = project(u, gaps=gaps if irregular else None)
    A, B = transition(project.measure, 8)
    eye, rule = (
        torch.eye(8).double(),
        {"bilinear": 0.5, "backward": 1.0, "forward": 0.0}.get(project.rule, project.rule),
    )
    for row in range(2):
        x, time = torch.zeros(D, 8, dtype=torch.float64), 0.0
        for k in range(T):
            gap = float(gaps[row, k])
            before, time = time, time + gap
            if rule == "zoh" and project.step is None:
                ratio = math.log(time / before) if before else 1e3  # the whole past is the first sample
                step, inverse = torch.linalg.matrix_exp(ratio * A), torch.linalg.inv(A)
                x = x @ step.T + u[row, k, :, None] * (inverse @ (step - eye) @ B)
            elif rule == "zoh":
                x = (
                    x @ torch.linalg.matrix_exp(gap * project.step * A).T
                    + u[row, k, :, None] * (discretise_dense(A, B, gap * project.step, "zoh")[1])
                )
            else:
                d = gap * project.step if project.step else gap / time
                left, right = eye - rule * d * A, eye + (1 - rule) * d * A
                x = torch.linalg.solve(left, right @ x.T + d * torch.outer(B, u[row, k])).T
            torch.testing.assert_close(got[row, k], x, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state["memory"][row], x, atol=1e-10, rtol=1e-10)
        if project.step is None:
            assert abs(float(state["elapsed"][row]) - time) < 1e-12


def test_forward_rule_with_a_short_past():
    """x_k = (I + A / k) x_{k-1} + B u_k / k, unstable until k is N and exact nevertheless."""
    project = Projection(1, states=4, rule="forward", dtype=torch.float64)
    u = torch.randn(1, T, 1, dtype=torch.float64)
    A, B = transition("legs", 4)
    x = torch.zeros(4).double()
    for k in range(1, T + 1):
        x = x + (A @ x + B * u[0, k - 1]) / k
        torch.testing.assert_close(project(u)[0][0, k - 1, 0], x, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [dict(rule="zoh"), dict(measure="legt", step=0.2, rule="zoh")])
def test_a_long_gap_is_an_input_held(options):
    project = Projection(D, states=8, **options, dtype=torch.float64)
    u = torch.randn(2, 7, D, dtype=torch.float64)
    held, _ = project(u.repeat_interleave(3, 1))
    irregular, _ = project(u, gaps=torch.full((2, 7), 3.0))
    torch.testing.assert_close(irregular, held[:, 2::3], atol=1e-10, rtol=1e-10)


def test_legs_has_no_timescale():
    """The same signal at half the rate gives the same coefficients: 1 / t has no unit."""
    signal = white_signal(1, torch.Generator().manual_seed(0), length=2000, dt=5e-4, freq=5.0)[..., None]
    project = Projection(1, states=16)
    fine, coarse = project(signal)[0][:, 1::2], project(signal[:, 1::2])[0]
    assert (fine - coarse)[:, 100:].abs().max() < 0.01
    window = Projection(1, measure="legt", states=16, step=2 / 1000)
    assert (window(signal)[0][:, 1::2] - window(signal[:, 1::2])[0])[:, 100:].abs().max() > 0.3


# -- the contract ------------------------------------------------------------------------------------------------------
@variants
@pytest.mark.parametrize("kind", ["whole", "packed", "packed_with_holes", "left", "blank_row"])
def test_splits_documents_and_padding_change_nothing(options, kind):
    case = read(options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(kind))
    if segments is not None:
        x[~segments.valid] = float("nan")
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, range(1, T), segments), whole(mixer, segments), x, state)
    if segments is not None:
        assert not got.outputs["y"][~segments.valid].any()
    single = case.build(torch.float32)
    clean = x.nan_to_num()
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), clean, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


def test_gaps_belong_to_documents():
    project = Projection(D, states=8, dtype=torch.float64)
    u, gaps = torch.randn(1, T, D, dtype=torch.float64), torch.rand(1, T, dtype=torch.float64) + 0.1
    packed, _ = project(u, gaps=gaps, segments=Segments.packed([[9, 12]]))
    torch.testing.assert_close(packed[:, 9:], project(u[:, 9:], gaps=gaps[:, 9:])[0], atol=1e-12, rtol=1e-12)


@variants
def test_gradients(options):
    project = Projection(2, states=4, **options, dtype=torch.float64)
    u = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: project(u)[0], u)


def test_half_precision_keeps_a_wide_state():
    for options in (dict(), dict(measure="legt", step=0.1)):
        project = Projection(D, states=8, **options)
        u = torch.randn(1, T, D).bfloat16()
        coefficients, state = project(u)
        assert (coefficients.dtype, state["memory"].dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(coefficients, project(u.float())[0].bfloat16())


# -- what it is for ----------------------------------------------------------------------------------------------------
def recalled(signal, states, **options):
    """Mean square error of the whole signal as the last coefficients have it."""
    length = signal.shape[1]
    project = Projection(1, states=states, **options)
    coefficients, _ = project(signal[..., None])
    ages = length - 0.5 - torch.arange(length)  # of the middle of each sample
    shares = ages / length if project.step is None else ages
    return float((project.reconstruct(coefficients[:, -1, 0], shares) - signal).square().mean())


def test_a_signal_comes_back():
    """64 coefficients are enough up to 5 Hz; at 20 Hz the error falls more than 100 times from 32 to 128."""
    draw = torch.Generator().manual_seed(0)
    slow, fast = (white_signal(4, draw, length=1000, dt=1e-3, freq=freq) for freq in (5.0, 20.0))
    for options in (dict(), dict(measure="legt", step=2 / 1000)):
        assert recalled(slow, 64, **options) < 1e-4 * float(slow.var())
        assert recalled(fast, 32, **options) > 100 * recalled(fast, 128, **options)
    assert recalled(slow, 64, measure="fout", step=2 / 1000) < 1e-2 * float(slow.var())  # a wave has no ends
    assert recalled(slow, 64, measure="lmu", step=1 / 1000) < 1e-4 * float(slow.var())
    assert recalled(slow, 64, measure="lagt", step=0.05) < 1e-3 * float(slow.var())
    assert recalled(slow, 64, measure="glagt", step=0.05) < 1e-3 * float(slow.var())
    assert recalled(slow, 64, measure="legs", step=2 / 1000) < 1e-3 * float(slow.var())


def test_a_delay_is_a_linear_readout_of_a_window():
    """{LegT, FouT} < 0.05 < {LegS family} < 0.35 < random: normalised error of the input of 256 tokens ago."""
    torch.manual_seed(0)
    inputs, targets = (x.double() for x in delay(24, torch.Generator().manual_seed(0), length=1024, lag=256, freq=60.0))
    targets = targets.flatten()
    split = 16 * 1024

    def error(features):
        features = features.reshape(24 * 1024, -1)
        features = features / features[:split].std(0).clamp(min=1e-12)
        train, eye = features[:split], 1e-6 * torch.eye(features.shape[1]).double()
        weight = torch.linalg.solve(train.T @ train + eye, train.T @ targets[:split])
        rest = targets[split:]
        return float((features[split:] @ weight - rest).square().mean() / rest.square().mean())

    def projected(measure, step=2 / 256, rule="bilinear"):
        return error(Projection(1, measure=measure, step=step, rule=rule, dtype=torch.float64)(inputs)[0])

    def diagonal(init):
        mixer = mixers.build("s4d", 1, init=init, dtype=torch.float64)
        real, imag = -torch.exp(mixer.log_real.detach()[0]), mixer.imag.detach()[0]
        decay, scale = discretise(real, imag, torch.tensor(2 / 256).double())
        h, _ = scan(decay, scale * inputs)
        return error(torch.view_as_real(h))

    assert projected("legt") < 0.05
    assert projected("fout") < 0.05
    for found in (projected("legs"), diagonal("legs"), diagonal("inv")):
        assert 0.05 < found < 0.35
    assert projected("random", step=1.0, rule="forward") > 0.5


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(measure="legd"), "measure: seen 'legd'"),
        (dict(measure="legt"), "step: seen None for 'legt'"),
        (dict(step=-1.0), "step: seen -1"),
        (dict(step=0.0), "step: seen 0"),
        (dict(rule="euler"), "rule: seen 'euler'"),
        (dict(measure="fout", step=0.1, states=3), "states: seen 3"),
    ],
)
def test_errors_name_the_option(options, match):
    with pytest.raises(ValueError, match=match):
        Projection(D, **options)


def test_errors_name_the_argument():
    project = Projection(D, states=8)
    with pytest.raises(ValueError, match="x: seen shape"):
        project(torch.randn(1, 5, D + 1))
    with pytest.raises(ValueError, match="gaps: seen shape"):
        project(torch.randn(1, 5, D), gaps=torch.ones(1, 4))

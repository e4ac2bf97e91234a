"""HiPPO's matrices against their kernels in closed form, normal plus low rank, discretised."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate.nn.hippo import MEASURES, basis, discretise_dense, kernels, nplr, transition

NORMAL = ("legs", "legt", "fout", "lagt", "glagt")


def polynomial(n, x):
    """Legendre's P_n by its sum, not by the recurrence of the code."""
    terms = [math.comb(n, k) ** 2 * (x - 1) ** (n - k) * (x + 1) ** k for k in range(n + 1)]
    return sum(terms) / 2**n


def laguerre(n, x):
    return sum((-1) ** k * math.comb(n, k) / math.factorial(k) * x**k for k in range(n + 1))


# -- matrices and kernels ----------------------------------------------------------------------------------------------
def test_legs_kernels_are_polynomials_on_a_fading_axis():
    t = torch.linspace(0, 5, 41, dtype=torch.float64)
    K = kernels("legs", 12, t)
    for n in range(12):
        wanted = torch.exp(-t) * math.sqrt(2 * n + 1) * polynomial(n, 2 * torch.exp(-t) - 1)
        torch.testing.assert_close(K[:, n], wanted, atol=1e-9, rtol=1e-9)


def test_laguerre_kernels():
    t = torch.linspace(0, 5, 41, dtype=torch.float64)
    for measure, rate, scale in (("lagt", 0.5, 1.0), ("glagt", 0.505, 0.1)):
        K = kernels(measure, 10, t)
        for n in range(10):
            wanted = scale * torch.exp(-rate * t) * laguerre(n, t)
            torch.testing.assert_close(K[:, n], wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_a_window_of_two_units(measure):
    """Inside the window the kernels are Legendre polynomials or waves, beyond it next to nothing."""
    inside, beyond = (torch.linspace(a, b, 41, dtype=torch.float64) for a, b in ((0.2, 1.8), (2.2, 6.0)))
    K, later = kernels(measure, 64, inside), kernels(measure, 64, beyond)
    for n in range(6):
        if measure == "legt":
            wanted = math.sqrt(2 * n + 1) / 2 * polynomial(n, 1 - inside)
        else:
            wave = (torch.cos, torch.sin)[n % 2](math.pi * (n // 2) * inside)
            wanted = wave / 2 if n == 0 else wave / math.sqrt(2)
        assert (K[:, n] - wanted).abs().mean() < 0.05
        assert later[:, n].abs().mean() < 0.02


def test_fout_has_a_dead_coordinate():
    A, B = transition("fout", 8)
    assert not A[1].any()
    assert not A[:, 1].any()
    assert B[1] == 0


def test_lmu_is_legt_in_other_coordinates_at_double_speed():
    A, B = transition("legt", 16)
    n = torch.arange(16).double()
    change = (-1.0) ** n * torch.sqrt(2 * n + 1)
    other, vector = transition("lmu", 16)
    torch.testing.assert_close(other, 2 * change[:, None] * A / change, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(vector, 2 * change * B)
    assert other[:2, :2].tolist() == [[-1, -1], [3, -3]]  # as the Legendre memory unit's paper has it
    assert vector[:2].tolist() == [1, -3]


def test_random_is_a_gaussian_matrix_of_spectral_radius_one_under_the_forward_rule():
    torch.manual_seed(0)
    step, _ = discretise_dense(*transition("random", 32), 1.0, "forward")
    assert abs(float(torch.linalg.eigvals(step).abs().max()) - 1) < 1e-12
    assert abs(float(step.std()) * 32**0.5 - 1) < 0.3  # Ginibre: the radius is near N^(1/2) deviations


def test_basis_functions():
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    for n in range(8):
        root = math.sqrt(2 * n + 1)
        torch.testing.assert_close(basis("legt", 8, 2 * x)[:, n], root * polynomial(n, 1 - 2 * x))
        torch.testing.assert_close(basis("lmu", 8, x)[:, n], polynomial(n, 2 * x - 1))
        torch.testing.assert_close(basis("legs", 8, x)[:, n], root * polynomial(n, 2 * torch.exp(-x) - 1))
        torch.testing.assert_close(basis("lagt", 8, x)[:, n], torch.exp(-x / 2) * laguerre(n, x))
        torch.testing.assert_close(basis("glagt", 8, x)[:, n], 10 * torch.exp(-0.495 * x) * laguerre(n, x))
    assert basis("legt", 1, x).tolist() == [[1.0]] * 9


# -- normal plus low rank ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("measure", NORMAL)
@pytest.mark.parametrize("states", [2, 6, 64, 128])
def test_normal_plus_low_rank_is_the_matrix(measure, states):
    eigenvalues, P, B, V = nplr(measure, states)
    A, vector = transition(measure, states)
    low_rank = V @ (torch.diag(eigenvalues) - P @ P.mH) @ V.mH
    torch.testing.assert_close(low_rank, A.to(V), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(V @ B, vector.to(V), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(V.mH @ V, torch.eye(states).to(V), atol=1e-12, rtol=0)
    assert P.shape == (states, 2 if measure == "legt" else 1)
    real = {"legs": -0.5, "glagt": -0.005}.get(measure, 0.0)
    assert (eigenvalues.real == real).all()
    # Conjugate pairs, the lower half first.
    half = states // 2
    assert (eigenvalues.imag[:half] <= 0).all()
    torch.testing.assert_close(eigenvalues, eigenvalues.flip(0).conj(), atol=1e-9, rtol=0)
    kept = V[:, :half]
    torch.testing.assert_close(2 * (kept @ kept.mH).real, torch.eye(states).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(2 * (kept @ B[:half]).real, vector, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_an_odd_number_of_states(measure):
    eigenvalues, P, _, V = nplr(measure, 9)
    low_rank = V @ (torch.diag(eigenvalues) - P @ P.mH) @ V.mH
    torch.testing.assert_close(low_rank, transition(measure, 9)[0].to(V), atol=1e-10, rtol=1e-10)
    assert abs(float(eigenvalues.imag[4])) < 1e-12


def test_eigenvalues():
    legs, legt, fout = (nplr(measure, 32)[0].imag for measure in ("legs", "legt", "fout"))
    assert abs(float(legs[-1]) - 325.4) < 0.1  # nearly N^2 / pi
    assert abs(float(legt[-1]) / 32**2 * 2 * math.pi - 1) < 0.05
    waves = torch.arange(16).double() * math.pi
    torch.testing.assert_close(fout, torch.cat([-waves.flip(0), waves]), atol=1e-9, rtol=0)
    A, _ = transition("legs", 16)
    assert A.diagonal().tolist() == [-(n + 1) for n in range(16)]
    assert not A.triu(1).any()


def test_a_larger_rank_adds_zeros():
    P = nplr("legs", 8, rank=2)[1]
    assert P.shape == (8, 2)
    assert not P[:, 1].any()
    torch.testing.assert_close(P[:, :1], nplr("legs", 8)[1])


# -- discretisation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("measure", MEASURES)
def test_discretisation_is_its_definition(measure):
    A, B = transition(measure, 8)
    eye = torch.eye(8).double()
    for rule, a in (("forward", 0.0), ("bilinear", 0.5), ("backward", 1.0), (0.25, 0.25)):
        step, taken = discretise_dense(A, B, 0.1, rule)
        torch.testing.assert_close((eye - a * 0.1 * A) @ step, eye + (1 - a) * 0.1 * A, atol=1e-12, rtol=0)
        torch.testing.assert_close((eye - a * 0.1 * A) @ taken, 0.1 * B, atol=1e-12, rtol=0)
    # u held over the step: the system's solution, here by many small steps. FouT's A has no inverse.
    step, taken = discretise_dense(A, B, 0.1, "zoh")
    fine, input_ = discretise_dense(A, B, 0.1 / 4096, "bilinear")
    x = torch.zeros(8).double()
    for _ in range(4096):
        x = fine @ x + input_
    torch.testing.assert_close(taken, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(step, torch.linalg.matrix_power(fine, 4096), atol=1e-5, rtol=0)


def test_discretisation_broadcasts_and_is_differentiable():
    A, B = transition("legt", 4)
    steps = torch.tensor([0.1, 0.2, 0.4]).double()
    for rule in ("forward", "bilinear", "backward", "zoh", 0.3):
        step, taken = discretise_dense(A, B, steps, rule)
        assert (step.shape, taken.shape) == ((3, 4, 4), (3, 4))
        for i in range(3):
            one, other = discretise_dense(A, B, float(steps[i]), rule)
            torch.testing.assert_close(step[i], one)
            torch.testing.assert_close(taken[i], other)
        leaves = [x.clone().requires_grad_() for x in (A, B, steps)]
        assert torch.autograd.gradcheck(lambda A, B, s, rule=rule: discretise_dense(A, B, s, rule), leaves)
        single = discretise_dense(A.float(), B.float(), 0.1, rule)
        for got, wanted in zip(single, discretise_dense(A, B, 0.1, rule), strict=True):
            torch.testing.assert_close(got, wanted.float(), atol=1e-6, rtol=1e-5)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: transition("legd", 4), "measure: seen 'legd'"),
        (lambda: transition("legs", 0), "states: seen 0"),
        (lambda: transition("fout", 5), "states: seen 5"),
        (lambda: nplr("lmu", 4), "measure: 'lmu' has no normal-plus-low-rank form"),
        (lambda: nplr("random", 4), "measure: 'random' has no"),
        (lambda: nplr("legt", 4, rank=1), "rank: seen 1, but 'legt' needs 2"),
        (lambda: discretise_dense(*transition("legs", 4), 0.1, "euler"), "rule: seen 'euler'"),
        (lambda: discretise_dense(*transition("legs", 4), 0.1, 1.5), "rule: seen 1.5"),
        (lambda: basis("random", 4, torch.zeros(1)), "measure: 'random' projects on no functions"),
    ],
)
def test_errors_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()

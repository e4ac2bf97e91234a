"""Gradients against finite differences, twice; backends and precisions against each other."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import tidegate
from tests.contract.helpers import (
    Subject,
    assert_near,
    assert_same,
    differentiable,
    results_of,
    segments_of,
    unless_excused,
    whole,
)
from tests.contract.test_equality import drawn
from tests.contract.tolerances import EQUAL, FINITE_DIFFERENCES
from tidegate import Segments, State


def as_function(subject: Subject, time: int = 4, segments: Segments | None = None):
    """The mixer as a function of plain tensors, and float64 arguments for it."""
    mixer = subject.build()
    state = subject.state(mixer, 2)
    floats = {path: t for path, t in state.items() if differentiable(t)}
    parameters = dict(mixer.named_parameters())

    def function(x, *leaves):
        given = State({**state, **dict(zip(floats, leaves, strict=False))})
        weights = dict(zip(parameters, leaves[len(floats) :], strict=True))
        y, last = functional_call(mixer, weights, (x, given), {"segments": segments})
        return (y, *(t for t in last.tensors().values() if differentiable(t)))

    arguments = (subject.input(2, time), *floats.values(), *parameters.values())
    return function, tuple(t.detach().clone().requires_grad_() for t in arguments)


@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_gradients_against_finite_differences(subject: Subject, kind: str):
    function, arguments = as_function(subject, 4, segments_of(kind, 2, 4, drawn("gradcheck", subject.name)))
    # Along random directions: one pair of evaluations for each argument and output.
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True, **FINITE_DIFFERENCES)


def test_second_derivatives_against_finite_differences(subject: Subject):
    function, arguments = as_function(subject, 3)
    with unless_excused(subject, "double_backward"):
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True, **FINITE_DIFFERENCES)


def test_second_derivatives_in_single_precision(subject: Subject):
    """The kernels' own gradients can be differentiated, and agree with float64."""

    def penalty(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        mixer = subject.build(dtype)
        x = subject.input(2, 19, dtype).requires_grad_()
        state = subject.state(mixer, 2, torch.float64 if dtype == torch.float64 else dtype)
        y, _ = mixer(x, state)
        (gradient,) = torch.autograd.grad((y * subject.input(2, 19, dtype, seed=8)).sum(), x, create_graph=True)
        leaves = {"x": x, **dict(mixer.named_parameters())}
        found = torch.autograd.grad(gradient.square().sum(), list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    with unless_excused(subject, "double_backward"):
        # Two derivatives: twice the roundings.
        got, wanted = penalty(torch.float32), penalty(torch.float64)
        assert_near(got, wanted, 2 * EQUAL[torch.float32], "second derivatives")


@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_the_backends_agree(subject: Subject, kind: str):
    """reference = parallel in float64, and the default of float32 (the kernels) = reference of float64."""
    time = 131 if kind == "whole" else 65
    segments = segments_of(kind, 2, time, drawn("backends", subject.name))
    double, single = subject.build(), subject.build(torch.float32)
    x = subject.input(2, time).float().double()
    state = subject.state(double, 2).to(torch.float32).to(torch.float64)
    results = {}
    for backend in ("reference", "parallel"):
        with tidegate.backend(backend):
            (results[backend],) = results_of((double,), (whole(double, segments),), x, state)
    assert_same(results["parallel"], results["reference"], EQUAL[torch.float64])
    (kernels,) = results_of((single,), (whole(single, segments),), x, state)
    assert_same(kernels, results["reference"], EQUAL[torch.float32])

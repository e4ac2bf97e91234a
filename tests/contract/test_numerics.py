"""Causality, dtypes, extreme gates, drift."""

from __future__ import annotations

import pytest
import torch

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
from tests.contract.tolerances import DRIFT, EQUAL, HALF


def test_the_past_does_not_depend_on_the_future(subject: Subject):
    draw = drawn("causality", subject.name)
    for dtype in (torch.float64, torch.float32):
        mixer = subject.build(dtype)
        x, state = subject.input(2, 131, dtype), subject.state(mixer, 2, dtype)
        for now in (1, draw.randrange(2, 64), draw.randrange(64, 131)):
            changed = x.clone()
            changed[:, now:] = 10 * subject.input(2, 131 - now, dtype, seed=7)
            with torch.no_grad():
                before, after = mixer(x, state)[0], mixer(changed, state)[0]
            with unless_excused(subject, "causality"):
                assert_near({"y": after[:, :now]}, {"y": before[:, :now]}, EQUAL[dtype], "outputs before the change")
            assert not torch.equal(after[:, now:], before[:, now:]), "the change itself has no effect"


def test_the_dtype_that_goes_in_comes_out(subject: Subject):
    x, segments = subject.input(2, 33), segments_of("packed_with_holes", 2, 33, drawn("dtype", subject.name))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mixer = subject.build(dtype)
        leaf = x.to(dtype).detach().clone().requires_grad_()
        y, state = mixer(leaf)
        assert y.dtype == dtype
        y_next, _ = mixer(leaf, state, segments=segments)
        assert y_next.dtype == dtype
        assert y.isfinite().all()
        (y.float().square().mean() + y_next.float().square().mean()).backward()
        for name, tensor in {"x": leaf, **dict(mixer.named_parameters())}.items():
            if tensor.grad is not None:
                assert tensor.grad.dtype == dtype, name
                assert tensor.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_the_same_function(subject: Subject, dtype: torch.dtype):
    mixer = subject.build(dtype)
    x = subject.input(2, 65, dtype)
    with torch.no_grad():
        y, _ = mixer(x)
        expected, _ = mixer.double()(x.double())
    assert_near({"y": y}, {"y": expected}, HALF[dtype], "outputs in half precision")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("extreme", ["inputs", "weights", "both", "zeros"])
def test_extreme_gates_stay_finite(subject: Subject, extreme: str, dtype: torch.dtype):
    mixer = subject.build(dtype)
    x = subject.input(2, 65, dtype)
    if extreme in ("weights", "both"):
        with torch.no_grad():
            for parameter in mixer.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(30)
    x = x * {"inputs": 1e3, "weights": 1.0, "both": 1e3, "zeros": 0.0}[extreme]
    x.requires_grad_()
    segments = segments_of("packed_with_holes", 2, 65, drawn("extreme", subject.name))
    with unless_excused(subject, "extreme_gates"):
        y, state = mixer(x)
        y_next, last = mixer(x, state, segments=segments)
        tensors = {"y": y, "y_next": y_next, **last.tensors()}
        # The mean, so that the loss itself is far from overflow.
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors.values() if differentiable(t)]
        loss = sum(t.double().mean() for t in real)
        loss.backward()
        gradients = {f"d{name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}
        broken = [name for name, t in {**tensors, "dx": x.grad, **gradients}.items() if not t.isfinite().all()]
        assert not broken, f"not finite: {', '.join(broken)}"


def test_the_number_of_threads_does_not_matter(subject: Subject):
    """Our kernels give the same bits (test_ops_threads.py); PyTorch's products may add in another order."""
    mixer = subject.build(torch.float32)
    x, state = subject.input(3, 131, torch.float32), subject.state(mixer, 3, torch.float32)
    segments = segments_of("packed_with_holes", 3, 131, drawn("threads", subject.name))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results += results_of((mixer,), (whole(mixer, segments),), x, state)
    with unless_excused(subject, "threads"):
        assert_same(results[1], results[0], EQUAL[torch.float32])


def test_ten_thousand_steps_do_not_drift(subject: Subject):
    double, single = subject.build(), subject.build(torch.float32)
    wanted = got = None
    with torch.no_grad(), unless_excused(subject, "drift"):
        for seed in range(10):
            x = subject.input(1, 1000, torch.float32, seed=100 + seed)
            y_single, got = single(x, got)
            y_double, wanted = double(x.double(), wanted)
            assert y_single.isfinite().all()
        assert_near({"y": y_single}, {"y": y_double}, DRIFT, "outputs after 9,000 steps")
        assert_near(got.tensors(), wanted.tensors(), DRIFT, "states after 10,000 steps")

"""S4ND: the sum over time and space, S4D as its special case, and a finer grid with the same weights."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tests.nn import test_grid
from tidegate import mixers, registry

D, T = 12, 7
OPTIONS = [
    dict(grid=()),
    dict(grid=(), rank=2, output="linear", step_rescale=2.0),
    dict(grid=(3,), init="lin", rule="bilinear", output="none"),
    dict(grid=(2, 2), rank=2, two_sided=False, bandlimit=0.4, grid_rescale=0.5),
    dict(grid=(2, 1, 3), init="real", num_systems=2),
]
VARIANTS = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))


def subject(options):
    return Subject("s4nd", registry.info("s4nd").cls, D, {"state_dim": 6, **options})


@VARIANTS
def test_equals_the_sum_over_time_and_space(options):
    mixer = subject(options).build()
    x, channels, pixels = torch.randn(2, T, D, dtype=torch.float64), D // mixer.pixels, mixer.pixels
    frames = x.view(2, T, *mixer.grid, channels)
    places = list(itertools.product(*map(range, mixer.grid)))
    test_grid_d, test_grid.D = test_grid.D, channels
    with torch.no_grad():
        try:
            space = [
                test_grid.kernels_of(mixer.space, axis, size, mixer.grid_rescale)
                for axis, size in enumerate(mixer.grid)
            ]
        finally:
            test_grid.D = test_grid_d
        decay, B, C = mixer.time.discretised(mixer.step_rescale)
        time = (B * C * decay ** torch.arange(T)[:, None, None]).real.sum(-1).unflatten(1, (mixer.rank, channels))
        z = mixer.skip * frames
        for (t, p), (s, q) in itertools.product(itertools.product(range(T), places), repeat=2):
            if s <= t:
                taps = time[t - s]
                for axis, (a, b) in enumerate(zip(p, q, strict=True)):
                    taps = taps * space[axis][..., a - b + mixer.grid[axis] - 1]
                z[(slice(None), t, *p)] += taps.mean(0) * frames[(slice(None), s, *q)]
        y = mixer.output_map(z.reshape(2, T, pixels, channels)).flatten(2)
        torch.testing.assert_close(mixer(x)[0], y, atol=1e-10, rtol=1e-10)


def test_without_a_grid_it_is_s4d():
    options = dict(state_dim=8, init="legs")
    mixer, s4d = mixers.build("s4nd", D, **options), mixers.build("s4d", D, **options)
    renamed = {name.removeprefix("time."): weight for name, weight in mixer.state_dict().items()}
    s4d.load_state_dict(renamed)
    x = torch.randn(2, 30, D)
    assert torch.equal(mixer(x)[0], s4d(x)[0])
    assert torch.equal(mixer(x)[1]["memory"], s4d(x)[1]["memory"])


@VARIANTS
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(options, kind):
    case = subject(options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(kind))
    check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 5), segments), alone(mixer, segments), x, state)
    single = case.build(torch.float32)
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), x, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


def test_a_frame_sees_itself_whole_and_no_later_one():
    mixer = mixers.build("s4nd", 24, grid=(2, 3), state_dim=8)
    x = torch.randn(1, 5, 24, requires_grad=True)
    y, _ = mixer(x)
    (gradient,) = torch.autograd.grad(y[0, 2, 0], x)  # of the first pixel of frame 2
    assert gradient[0, :3].view(3, 6, 4).abs().sum(-1).all()  # every pixel of it and of those before
    assert not gradient[0, 3:].any()


def test_weights_serve_another_grid():
    coarse = mixers.build("s4nd", 4 * 4 * 2, grid=(4, 4), state_dim=8, bandlimit=0.5)
    fine = mixers.build("s4nd", 8 * 8 * 2, grid=(8, 8), state_dim=8, bandlimit=0.5, grid_rescale=0.5, step_rescale=0.5)
    fine.load_state_dict(coarse.state_dict())
    y, state = fine(torch.randn(1, 3, 128))
    assert (y.shape, state["memory"].shape) == ((1, 3, 128), (1, 128, 4))


def test_errors():
    for name, options in (
        ("grid", dict(grid=(5,))),
        ("grid", dict(grid=(0, 2))),
        ("rank", dict(rank=0)),
        ("rule", dict(rule="trapezoid")),
        ("step_rescale", dict(step_rescale=0.0)),
        ("grid_rescale", dict(grid_rescale=-1.0)),
        ("bandlimit", dict(grid=(2,), bandlimit=0.0)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: seen"):
            mixers.build("s4nd", D, **options)

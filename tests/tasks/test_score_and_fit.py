"""Scoring and training, whatever the task: by the kind of its targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tidegate.models.sequence import SequenceModel
from tidegate.tasks.fit import fit
from tidegate.tasks.recall import PairModel, one_token_pairs
from tidegate.tasks.score import losses, majority, score
from tidegate.tasks.targets import IGNORE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Oracle(torch.nn.Module):
    """Knows the answer to everything, by `confidence`."""

    def __init__(self, targets, classes, confidence):
        super().__init__()
        self.logits = confidence * torch.nn.functional.one_hot(targets.clamp(min=0), classes).float()

    def forward(self, inputs):
        return self.logits, None


def test_the_score_counts_targets_only():
    inputs, targets = one_token_pairs(4, generator())
    assert score(Oracle(targets, 16, 100.0), [(inputs, targets)]) == {"loss": 0.0, "accuracy": 1.0}
    assert score(Oracle(targets, 16, 0.0), [(inputs, targets)])["loss"] == pytest.approx(math.log(16))
    assert score(Oracle(targets, 16, -1.0), [(inputs, targets)])["accuracy"] == 0.0
    with pytest.raises(ValueError, match="no position has a target"):
        score(Oracle(targets, 16, 1.0), [(inputs, torch.full_like(targets, IGNORE))])


def test_bits_and_real_numbers_are_scored_as_such():
    def answers(outputs):
        return lambda inputs: (outputs, None)

    bits = torch.tensor([[[0, 1], [1, IGNORE]]])
    seen = score(answers(torch.tensor([[[-2.0, 0.5], [-1.0, 7.0]]])), [(None, bits)])
    wanted = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.0))]
    assert seen == {"loss": pytest.approx(sum(wanted) / 3, rel=1e-6), "accuracy": pytest.approx(2 / 3)}

    real = torch.tensor([[[1.0], [3.0], [math.nan]]])
    seen = score(answers(torch.tensor([[[2.0], [2.0], [9.0]]])), [(None, real)])
    assert seen == {"loss": 1.0, "nmse": 1.0}

    classes = torch.tensor([1, 0])
    assert score(answers(torch.tensor([[0.0, 9.0], [0.0, 9.0]])), [(None, classes)])["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"outputs, targets: seen shapes \(1, 5, 3\) and \(1, 4\)"):
        losses(torch.zeros(1, 5, 3), torch.zeros(1, 4, dtype=torch.long))


def test_the_loss_is_torchs_own():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    targets[0, :3] = IGNORE
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses(logits, targets)[0].mean(), wanted)


def test_majority_is_the_largest_class():
    assert majority(torch.tensor([1, 1, 2, IGNORE, IGNORE, IGNORE])) == pytest.approx(2 / 3)


def test_fit_learns_and_tells():
    torch.manual_seed(0)
    model, train = PairModel(4, 2, 16, "attention"), generator()
    told = []
    losses = fit(
        model,
        lambda: one_token_pairs(16, train, keys=4, values=2, stored=2, asked=1),
        steps=60,
        lr=1e-2,
        warmup=5,
        say=lambda step, loss: told.append((step, loss)),
    )
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert told == list(enumerate(losses, 1))


def test_fit_stops_at_a_loss_that_is_not_finite():
    model = PairModel(4, 2, 16, "gla")
    torch.nn.init.constant_(model.head.weight, math.nan)
    losses = fit(model, lambda: one_token_pairs(2, generator(), keys=4, values=2, stored=2, asked=1), steps=9, lr=1e-3)
    assert len(losses) == 1
    assert math.isnan(losses[0])


# -- what an optimiser step does, looked at from outside ---------------------------------------------------------------
class Line(torch.nn.Module):
    """y = w x + b, with gradients that are always 1: Adam then moves every parameter by the learning rate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), 5.0))
        self.offset = torch.nn.Parameter(torch.full((1,), 5.0))
        self.asked = 0

    def forward(self, x):
        return x @ self.weight + self.offset, None


def line_steps(steps, **options):
    """The weight and the offset after every step; the target is far below, so that both fall."""
    model, seen = Line(), [(5.0, 5.0)]
    batch = torch.ones(1, 1, 1), torch.full((1, 1, 1), -1e6)
    note = lambda step, loss: seen.append((model.weight.item(), model.offset.item()))  # noqa: E731
    fit(model, lambda: batch, steps=steps, lr=0.01, say=note, **options)
    return [(a[0] - b[0], a[1] - b[1]) for a, b in itertools.pairwise(seen)]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
    ],
)
def test_the_rate_follows_its_schedule(schedule, factors):
    moved = [weight / 0.01 for weight, _ in line_steps(6, warmup=2, schedule=schedule)]
    assert moved == pytest.approx(factors, rel=1e-3)


def test_some_parameters_have_a_rate_of_their_own():
    moved = line_steps(2, warmup=1, rates={"off": 0.002})
    assert [round(weight, 4) for weight, _ in moved] == [0.01, 0.01]
    assert [round(offset, 4) for _, offset in moved] == [0.002, 0.002]
    with pytest.raises(ValueError, match=r"rates: 'log_step' is in no parameter's name; there are weight, offset"):
        line_steps(1, rates={"log_step": 1.0})


def test_weight_decay_takes_matrices_only():
    plain, decayed = line_steps(1, warmup=1), line_steps(1, warmup=1, weight_decay=0.1)
    assert decayed[0][0] - plain[0][0] == pytest.approx(0.01 * 0.1 * 5, rel=1e-3)
    assert decayed[0][1] == plain[0][1]


def test_a_penalty_moves_the_model_and_is_left_out_of_the_loss():
    model, batch = Line(), (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 5.0))
    losses = fit(
        model, lambda: batch, steps=3, lr=0.01, warmup=1, penalty=lambda: model.weight.sum() + 0 * model.offset.sum()
    )
    assert model.weight.item() == pytest.approx(5 - 0.03, rel=1e-3)
    assert losses == [0.0] * 3


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule: seen 'wsd', wanted one of constant, cosine, linear"):
        line_steps(1, schedule="wsd")


def test_fit_serves_bits_and_real_numbers():
    torch.manual_seed(0)
    model = SequenceModel(16, "gla", features=1, outputs=1, pool="last")
    train = generator()

    def draw():
        x = torch.randn(32, 3, 1, generator=train)
        return x, x[:, -1]

    assert fit(model, draw, steps=80, lr=1e-2)[-1] < 0.2
    bits = SequenceModel(16, "gla", features=1, outputs=1)
    losses = fit(bits, lambda: (lambda x, _: (x, (x > 0).long()))(*draw()), steps=60, lr=1e-2)
    assert losses[-1] < 0.4 < losses[0]

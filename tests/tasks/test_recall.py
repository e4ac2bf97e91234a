"""Recall tasks: what the generators promise, and the model and the score on top."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate.tasks.fit import fit
from tidegate.tasks.recall import IGNORE, PairModel, one_token_pairs, score, segment_recall

KEYS, VALUES = 5, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def segments_by_hand(ids, targets):
    """Walk through a row token by token, as a reader would; gives the number of targets."""
    book, found, at = {}, 0, 0
    while at < len(ids):
        if ids[at] == 0:
            book, at = {}, at + 1
            assert targets[at - 1] == IGNORE
            continue
        assert 1 <= ids[at] <= KEYS, f"no key at {at}"
        if ids[at] in book:
            assert targets[at] == book[ids[at]]
            found += 1
        else:
            assert targets[at] == IGNORE
        if at + 1 < len(ids):
            assert KEYS < ids[at + 1] <= KEYS + VALUES, f"no value at {at + 1}"
            assert targets[at + 1] == IGNORE
            assert book.setdefault(ids[at], ids[at + 1]) == ids[at + 1], "a key changed its value inside a segment"
        else:
            assert ids[at] not in book or targets[at] == book[ids[at]]
        at += 2
    return found


@pytest.mark.parametrize("length", [1, 2, 9, 40, 41])
def test_segments_hold_their_bindings(length):
    ids, targets = segment_recall(16, generator(), length=length, keys=KEYS, values=VALUES, pairs=[2, 7])
    assert ids.shape == targets.shape == (16, length)
    assert (ids[:, 0] == 0).all()
    found = sum(map(segments_by_hand, ids.tolist(), targets.tolist()))
    assert found == (targets != IGNORE).sum()
    assert found > 0 or length < 9


def test_segments_have_the_lengths_asked_for():
    ids, _ = segment_recall(64, generator(), length=200, keys=KEYS, values=VALUES, pairs=[2, 7])
    resets = [row.nonzero().flatten().diff() for row in (ids == 0)]
    assert set(torch.cat(resets).tolist()) == {5, 15}


def test_bindings_change_between_segments():
    ids, _ = segment_recall(8, generator(), length=200, keys=1, values=VALUES, pairs=[2])
    for row in ids.tolist():
        assert len({row[at + 2] for at, token in enumerate(row[:-2]) if token == 0}) > 1


def test_pairs_ask_for_what_was_shown():
    pairs, targets = one_token_pairs(16, generator(), keys=20, values=VALUES, stored=8, asked=6)
    assert pairs.shape == (16, 14, 2)
    for row, wanted in zip(pairs.tolist(), targets.tolist(), strict=True):
        book = dict(row[:8])
        assert len(book) == 8
        assert set(book.values()) <= set(range(VALUES))
        asked = [key for key, mark in row[8:] if mark == VALUES]
        assert len(set(asked)) == 6
        assert wanted == [IGNORE] * 8 + [book[key] for key in asked]


@pytest.mark.parametrize("draw", [segment_recall, one_token_pairs])
def test_data_are_a_function_of_the_generator(draw):
    first, again, other = (draw(4, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="length: seen 0"):
        segment_recall(1, generator(), length=0)
    with pytest.raises(ValueError, match="pairs: seen 0"):
        segment_recall(1, generator(), pairs=[])
    with pytest.raises(ValueError, match="asked <= stored <= keys"):
        one_token_pairs(1, generator(), keys=8, stored=9, asked=3)
    with pytest.raises(ValueError, match=r"pairs: seen shape \(1, 5\)"):
        PairModel(8, 4, 16, "gla")(torch.zeros(1, 5, dtype=torch.long))


def test_the_pair_model_carries_its_state():
    torch.manual_seed(0)
    model = PairModel(64, 16, 16, ["gla", ("attention", {"num_heads": 2})])
    pairs, _ = one_token_pairs(2, generator())
    whole, _ = model(pairs)
    head, state = model(pairs[:, :20])
    tail, _ = model(pairs[:, 20:], state)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-4, atol=1e-5)


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

"""Recall tasks: what the generators promise, and the model for pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from tidegate.tasks.recall import (
    IGNORE,
    PairModel,
    associative_recall,
    induction,
    induction_copies,
    mqar,
    one_token_pairs,
    pairs_in_noise,
    segment_recall,
)

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


@pytest.mark.parametrize(
    "draw",
    [segment_recall, one_token_pairs, mqar, associative_recall, pairs_in_noise, induction, induction_copies],
)
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


# -- pairs first, questions later --------------------------------------------------------------------------------------
@pytest.mark.parametrize("others", [True, False])
def test_mqar_labels_are_found_by_scanning(others):
    ids, targets = mqar(64, generator(), vocab_size=40, length=32, pairs=5, random_non_queries=others)
    assert ids.shape == targets.shape == (64, 32)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        keys, values = row[0:10:2], row[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert set(keys) <= set(range(1, 20))
        assert set(values) <= set(range(20, 40))
        book = dict(zip(keys, values, strict=True))
        asked = [at for at, target in enumerate(wanted) if target != IGNORE]
        assert sorted(row[at] for at in asked) == sorted(keys)
        assert all(at >= 10 and at % 2 == 0 and wanted[at] == book[row[at]] for at in asked)
        if not others:
            assert all(row[at] == 0 for at in range(10, 32) if at not in asked)


def test_mqar_questions_follow_the_power_law():
    draws = 20_000
    _, targets = mqar(draws, generator(), vocab_size=8, length=12, pairs=1, power=0.01)
    seen = (targets[:, 2::2] != IGNORE).double().mean(0)
    law = torch.arange(1, 6, dtype=torch.float64) ** -0.99
    torch.testing.assert_close(seen, law / law.sum(), rtol=0, atol=4 * (0.25 / draws) ** 0.5)


def test_two_questions_are_drawn_one_after_the_other():
    """P(slots a, b) = p_a p_b / (1 - p_a), then in the other order."""
    draws = 20_000
    _, targets = mqar(draws, generator(), vocab_size=8, length=10, pairs=2, power=-1.0)
    p = torch.tensor([1.0, 1 / 4, 1 / 9]).double()
    p /= p.sum()
    found = (targets[:, 4::2] != IGNORE).double()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        wanted = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert (found[:, a] * found[:, b]).mean() == pytest.approx(wanted.item(), abs=4 * (0.25 / draws) ** 0.5)


def test_associative_recall_asks_for_what_occurred():
    ids, targets = associative_recall(256, generator(), keys=3, values=4, pairs=5)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        book = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert all(book[key] == value for key, value in zip(row[0:10:2], row[1:10:2], strict=True))
        assert set(book) <= {0, 1, 2}
        assert set(book.values()) <= {3, 4, 5, 6}
        assert row[10] == 7
        assert wanted == [IGNORE] * 11 + [book[row[11]]]
    asked = torch.tensor([len(set(row[0:10:2])) for row in ids.tolist()])
    assert asked.min() < 3, "some key did not occur somewhere, or the test shows nothing"


def test_a_missing_key_is_answered_with_the_mark():
    ids, targets = associative_recall(256, generator(), keys=9, values=2, pairs=3, missing=True)
    occurred = (ids[:, 0:6:2] == ids[:, -1:]).any(1)
    assert 0 < occurred.sum() < 256
    assert torch.equal(targets[:, -1] == 11, ~occurred)


def test_pairs_in_noise_are_where_they_should_be():
    ids, targets = pairs_in_noise(128, generator())
    assert ids.shape == (128, 80)
    active = ids < 16
    assert (active.sum(1) == 12).all(), "15 % of the positions matter"
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        shown = [at for at in range(64) if row[at] < 8]
        book = {row[at]: row[at + 1] for at in shown}
        assert all(at % 2 == 0 for at in shown)
        assert len(book) == 4
        assert all(8 <= value < 16 for value in book.values())
        asked = {at: row[at] for at in range(64, 80) if row[at] < 16}
        assert sorted(asked.values()) == sorted(book)
        assert wanted == [book[asked[at]] if at in asked else IGNORE for at in range(80)]


# -- induction ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [3, 4, 40])
def test_induction_asks_for_the_successor(length):
    ids, targets = induction(256, generator(), vocab_size=6, length=length)
    places = set()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        at = row.index(5)
        places.add(at)
        assert [t for t, token in enumerate(row) if token == 5] == [at, length - 1]
        assert wanted == [IGNORE] * (length - 1) + [row[at + 1]]
    assert places == set(range(length - 2)), "every place is possible"


@pytest.mark.parametrize(("copied", "triggers"), [(1, 1), (2, 3), (3, 2)])
def test_induction_copies_repeat_after_every_trigger(copied, triggers):
    ids, targets = induction_copies(256, generator(), symbols=9, length=20, copied=copied, triggers=triggers)
    assert ids.shape == targets.shape == (256, 20 + copied)
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    counts = []
    for row, last in zip(ids.tolist(), targets[:, -1].tolist(), strict=True):
        row.append(last)
        at = [t for t, token in enumerate(row) if token == 9]
        assert at[-1] == 20
        assert all(b - a > copied for a, b in itertools.pairwise(at))
        assert len({tuple(row[t + 1 : t + 1 + copied]) for t in at}) == 1
        counts.append(len(at) - 1)
    assert set(counts) == set(range(1, triggers + 1))
    assert counts.count(1) >= 0.35 * 256
    again = induction_copies(256, generator(), symbols=9, length=20, copied=copied, triggers=triggers, everywhere=False)
    assert torch.equal(again[0], ids)
    assert (again[1][:, :20] == IGNORE).all()
    assert torch.equal(again[1][:, 20:], targets[:, 20:])


@pytest.mark.parametrize(
    ("draw", "sizes", "message"),
    [
        (mqar, {"length": 63}, "length: seen 63"),
        (mqar, {"length": 14}, "at least 4 pairs = 16"),
        (mqar, {"vocab_size": 8}, r"vocab_size: seen 8, .* = 10"),
        (associative_recall, {"keys": 0}, "keys: seen 0"),
        (pairs_in_noise, {"pairs": 9}, "pairs: seen 9, wanted at most keys = 8"),
        (induction, {"length": 2}, "length: seen 2"),
        (induction, {"vocab_size": 1}, "vocab_size: seen 1"),
        (induction_copies, {"length": 4, "copied": 2, "triggers": 2}, "at least copied"),
    ],
)
def test_sizes_that_cannot_be_are_named(draw, sizes, message):
    with pytest.raises(ValueError, match=message):
        draw(2, generator(), **sizes)

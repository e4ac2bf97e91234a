"""State tracking: every label computed a second time, by Python's parser or by moving things about."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tidegate.tasks.state_tracking import (
    group_elements,
    group_words,
    modular_arithmetic,
    modular_arithmetic_answer,
    multiplication_table,
    parity,
    parity_answer,
)
from tidegate.tasks.targets import IGNORE

DRAWS = (parity, parity_answer, modular_arithmetic, modular_arithmetic_answer, group_words)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- parity ------------------------------------------------------------------------------------------------------------
def test_parity_counts_the_ones():
    ids, targets = parity(16, generator(), length=21)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert wanted == [sum(row[: t + 1]) % 2 for t in range(21)]


def test_the_answer_stands_behind_the_string():
    ids, targets = parity_answer(500, generator(), lengths=(3, 6))
    assert ids.shape == (500, 7)
    lengths = []
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        length = row.index(0)
        assert set(row[:length]) <= {1, 2}
        assert row[length:] == [0] * (7 - length)
        assert wanted == [IGNORE] * length + [1 + row.count(2) % 2] + [IGNORE] * (6 - length)
        lengths.append(length)
    for length in (3, 4, 5, 6):
        assert lengths.count(length) == pytest.approx(125, abs=4 * math.sqrt(500 * 3 / 16))
    assert 200 < (targets == 1).sum() < 300


# -- arithmetic --------------------------------------------------------------------------------------------------------
def text_of(ids, brackets=False):
    signs = "_+-*=()" if brackets else "_+-*="
    return "".join(signs[token] if token < len(signs) else str(token - len(signs)) for token in ids)


@pytest.mark.parametrize(("operators", "modulus"), [("+-*", 5), ("+-", 3), ("*", 7)])
def test_the_value_of_every_prefix_is_pythons(operators, modulus):
    ids, targets = modular_arithmetic(64, generator(), length=12, modulus=modulus, operators=operators)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        text = text_of(row)
        assert set(text[1::2]) <= set(operators)
        assert wanted[1::2] == [IGNORE] * 6
        assert wanted[::2] == [eval(text[:end]) % modulus for end in range(1, 13, 2)]
    assert set(text_of(ids.flatten().tolist())) == set(operators) | set(map(str, range(modulus)))


@pytest.mark.parametrize("brackets", [False, True])
def test_the_answer_of_an_expression_is_pythons(brackets):
    options = {"operators": "+-*"} if brackets else {}
    ids, targets = modular_arithmetic_answer(400, generator(), lengths=(3, 12), brackets=brackets, **options)
    assert ids.shape == targets.shape == (400, 14)
    lengths = set()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        text = text_of(row, brackets)
        expression, _, rest = text.partition("=")
        assert set(rest) == {"_"}
        assert "_" not in expression
        at = len(expression) + 1
        assert wanted == [IGNORE] * at + [eval(expression) % 5] + [IGNORE] * (13 - at)
        lengths.add(len(expression))
    assert lengths == (set(range(3, 13)) if brackets else {3, 5, 7, 9, 11})


def test_brackets_have_twelve_tokens_and_no_product_unless_asked_for():
    ids, _ = modular_arithmetic_answer(400, generator(), lengths=(1, 20), brackets=True)
    assert set(ids.unique().tolist()) == set(range(12)) - {3}


# -- groups ------------------------------------------------------------------------------------------------------------
ORDERS = {"S3": 6, "S4": 24, "S5": 120, "A4": 12, "A5": 60, "Z2": 2, "Z60": 60, "S1": 1}


@pytest.mark.parametrize("group", ORDERS)
def test_tables_are_groups(group):
    table, n = multiplication_table(group), ORDERS[group]
    everything = torch.arange(n)
    assert table.shape == (n, n)
    assert torch.equal(table[0], everything), "element 0 is the identity"
    assert torch.equal(table[:, 0], everything)
    assert torch.equal(table.sort(0).values, everything[:, None].expand(n, n)), "every column has every element"
    assert torch.equal(table[table], table[:, table]), "(g h) k = g (h k)"


@pytest.mark.parametrize("group", ["S3", "S4", "A5", "Z5"])
def test_products_move_things(group):
    """Things in a row, moved by one permutation after the other: where is each of them now?"""
    elements = group_elements(group)
    ids, targets = group_words(8, generator(), group=group, length=20)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert (row[0], wanted[0]) == (len(elements), IGNORE)
        place = list(range(len(elements[0])))  # of every thing
        for element, product in zip(row[1:], wanted[1:], strict=True):
            place = [elements[element][at] for at in place]
            assert elements[product] == tuple(place)


@pytest.mark.parametrize(("moves", "count"), [("all", 120), ("swaps", 11), ("swaps and 3-cycles", 31)])
def test_moves_are_few_but_reach_everything(moves, count):
    ids, targets = group_words(300, generator(), group="S5", length=40, moves=moves, bos=False)
    elements = group_elements("S5")
    assert len(ids.unique()) == count
    assert len(targets.unique()) == 120
    most = {"all": 5, "swaps": 2, "swaps and 3-cycles": 3}[moves]
    assert all(sum(i != p for i, p in enumerate(elements[index])) <= most for index in ids.unique().tolist())


def test_fillers_give_time():
    ids, targets = group_words(4, generator(), group="S3", length=5, fillers=3)
    dense, wanted = group_words(4, generator(), group="S3", length=5)
    assert ids.shape == (4, 21)
    assert torch.equal(ids[:, 1::4], dense[:, 1:])
    assert torch.equal(targets[:, 4::4], wanted[:, 1:])
    others = torch.ones(21, dtype=torch.bool)
    others[4::4] = False
    assert (targets[:, others] == IGNORE).all()
    assert set(ids[:, 1:].unflatten(1, (5, 4))[..., 1:].unique().tolist()) == {7}


def test_alternating_groups_are_the_even_permutations():
    def sign(p):
        return math.prod(-1 if p[i] > p[j] else 1 for i, j in itertools.combinations(range(len(p)), 2))

    assert set(group_elements("A4")) == {p for p in group_elements("S4") if sign(p) == 1}


# -- all ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("draw", DRAWS)
def test_data_are_a_function_of_the_generator(draw):
    first, again, other = (draw(4, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("draw", "sizes", "message"),
    [
        (parity, {"length": 0}, "length: seen 0"),
        (parity_answer, {"lengths": (5, 4)}, "lengths: seen 5 to 4"),
        (modular_arithmetic, {"operators": "/"}, "operators: seen '/'"),
        (modular_arithmetic_answer, {"lengths": (1, 4)}, "lengths: seen 1 to 4"),
        (group_words, {"group": "Q8"}, "group: seen 'Q8'"),
        (group_words, {"group": "S9"}, "group: S9 has more than"),
        (group_words, {"group": "A5", "moves": "swaps"}, "moves: 'swaps' belong to a symmetric group"),
        (group_words, {"moves": "some"}, "moves: seen 'some'"),
        (group_words, {"fillers": -1}, "fillers: seen -1"),
    ],
)
def test_sizes_that_cannot_be_are_named(draw, sizes, message):
    with pytest.raises(ValueError, match=message):
        draw(2, generator(), **sizes)

"""The ladder of the surveys: equal nets, tasks as they are described, and checks that can fail."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate.papers import Situation, ladder, mamba_360, s4_survey
from tidegate.tasks.targets import scored

SMOKE = Situation(smoke=True)
TOKENS = {"vocab_size": 8, "outputs": 8}
SYSTEMS = sorted({*s4_survey.SYSTEMS, *mamba_360.SYSTEMS, ladder.LEGT, ladder.RANDOM, ladder.NO_POSITIONS})


def test_every_system_is_asked_for_by_a_paper():
    assert sorted(ladder.LAYERS) == SYSTEMS
    assert len(set(mamba_360.SYSTEMS)) == sum(map(len, mamba_360.FAMILIES.values()))  # no system in two families


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_nets_have_the_same_size(system):
    model = ladder.build(system, **TOKENS)
    assert abs(model.num_parameters / ladder.BUDGET - 1) < 0.01
    assert len(model.blocks) == 2
    assert model.dim == ladder.DIM


def test_building_does_not_depend_on_what_was_built_before():
    ladder._width.cache_clear()
    torch.manual_seed(3)
    first = ladder.build(ladder.LRU, **TOKENS)  # looks for its width
    torch.manual_seed(3)
    again = ladder.build(ladder.LRU, **TOKENS)  # knows it
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ladder.RUNGS))
def test_rows_fit_the_net_and_are_no_longer_than_said(name):
    task = ladder.RUNGS[name]
    for draw in (task.draw, *task.scored.values()):
        inputs, targets = draw(3, torch.Generator().manual_seed(0))
        assert inputs.shape[1] <= ladder.LONGEST
        assert scored(targets).any(1).all()
        if "vocab_size" in task.ends:
            assert int(inputs.max()) < task.ends["vocab_size"]
            assert int(targets.max()) < task.ends["outputs"]


def test_what_was_trained_once_is_not_trained_again(monkeypatch):
    monkeypatch.setattr(ladder, "_TRAINED", {})
    lines = []
    told = Situation(smoke=True, note=lines.append)
    first = ladder.climb({ladder.S4D: ("T4",)}, 0, told)
    assert first == ladder.climb({ladder.S4D: ("T4",)}, 0, told)
    assert len(lines) == 1
    assert list(first.numbers[ladder.S4D]) == [ladder.INDUCTION, ladder.LONGER]
    twice = ladder.climb({ladder.S4D: ("T4",)}, 0, told, times=2)
    assert list(twice.numbers) == [s4_survey.PATIENT]
    ladder.climb({ladder.S4D: ("T4",)}, 1, told)
    assert len(lines) == 3
    ladder._TRAINED.clear()
    assert first == ladder.climb({ladder.S4D: ("T4",)}, 0, told)  # bit for bit


def test_the_state_of_attention_grows_and_that_of_mamba_does_not():
    numbers = ladder.cost((ladder.MAMBA, ladder.HYBRID, ladder.ATTENTION), SMOKE).numbers
    growth = [row[ladder.GROWTH] for row in numbers.values()]
    assert growth[0] == 1
    assert 1 < growth[1] < growth[2] <= 2  # twice the tokens
    assert all(row[ladder.DIFFERENCE] < 1e-5 for row in numbers.values())
    assert all(row[ladder.MORE] == row[ladder.LATE] / row[ladder.EARLY] for row in numbers.values())


def test_a_net_that_forgets_its_state_differs_from_one_call():
    model = ladder.build(ladder.LRU, **TOKENS).eval()
    ids = torch.randint(8, (1, 12), generator=torch.Generator().manual_seed(0))
    assert ladder.stepwise_difference(model, ids) < 1e-5
    assert ladder.stepwise_difference(lambda ids, state=None: model(ids), ids) > 1e-2


# -- checks ------------------------------------------------------------------------------------------------------------
def failed(paper, name, numbers):
    (tried,) = [tried for tried in paper.experiments if tried.name == name]
    return [check.text for check in tried.checks if check.deciding and not check.met(check.measure(numbers))]


def survey_numbers():
    """What the survey claims, in numbers."""
    fine = dict.fromkeys((ladder.PLAIN, ladder.SELECTIVE, ladder.LONGER, ladder.RECALL, ladder.MANY), 1.0)
    return {
        ladder.S4D: {**dict.fromkeys(fine, 0.3), ladder.PLAIN: 1.0},
        ladder.MAMBA: {**fine, ladder.MANY: 0.5},
        ladder.HYBRID: fine,
        ladder.H3: fine,
        ladder.NO_POSITIONS: {ladder.MANY: 0.5},
    }


def test_the_survey_holds_if_selection_and_attention_are_needed():
    numbers = survey_numbers()
    assert failed(s4_survey.PAPER, "selection and recall", numbers) == []
    numbers[ladder.S4D] = numbers[ladder.MAMBA]
    assert failed(s4_survey.PAPER, "selection and recall", numbers) == [
        "T3: S4D",
        "T4 at 128: S4D",
        "T5, 6 keys: S4D",
        "mean of T3 to T5: Mamba minus S4D",
    ]


def test_the_survey_fails_if_mamba_does_without_attention():
    numbers = survey_numbers()
    numbers[ladder.MAMBA] = numbers[ladder.HYBRID]
    wanted = ["T5, 16 keys: Mamba", "mean of T3 to T5: hybrid minus Mamba"]
    assert failed(s4_survey.PAPER, "selection and recall", numbers) == wanted


def test_the_survey_fails_if_a_state_grows_or_no_step_does():
    flat = {ladder.GROWTH: 1.0, ladder.MORE: 1.0, ladder.DIFFERENCE: 0.0}
    numbers = {system: dict(flat) for system in s4_survey.SYSTEMS}
    numbers[ladder.HYBRID] |= {ladder.GROWTH: 20.0}
    numbers[ladder.ATTENTION] |= {ladder.GROWTH: 32.0, ladder.MORE: 4.0}
    assert failed(s4_survey.PAPER, "T6: cost", numbers) == []
    numbers[ladder.S5] |= {ladder.GROWTH: 1.5}
    numbers[ladder.ATTENTION] |= {ladder.MORE: 1.2}
    assert len(failed(s4_survey.PAPER, "T6: cost", numbers)) == 2


def test_the_families_hold_if_the_structural_ones_remember_best():
    quantities = (ladder.PLAIN, ladder.SELECTIVE, ladder.LONGER)
    numbers = {system: {ladder.DELAY: 0.2, **dict.fromkeys(quantities, 1.0)} for system in mamba_360.OTHERS}
    numbers |= {system: {ladder.DELAY: 0.1, **dict.fromkeys(quantities, 0.4)} for system in (ladder.S4D, ladder.LEGT)}
    assert failed(mamba_360.PAPER, "three families", numbers) == []
    numbers[ladder.LRU] |= {ladder.DELAY: 0.05, ladder.PLAIN: math.nan}
    assert failed(mamba_360.PAPER, "three families", numbers) == [
        "T1: larger error of S4D and LegT over the smallest of the others",
        "T2: LRU",
    ]

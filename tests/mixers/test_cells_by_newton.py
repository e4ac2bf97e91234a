"""Cells solved for all tokens at once keep the contract, too: splits, documents, padding and gradients, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.contract import test_equality, test_gradients
from tests.contract.helpers import Subject
from tidegate import registry
from tidegate.nn.cell import CellLayer
from tidegate.ops.cell import newton

CELLS = [name for name in registry.names() if issubclass(registry.info(name).cls, CellLayer)]


@dataclass(frozen=True)
class Solved(Subject):
    """A cell's mixer that is run by Newton's method."""

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        mixer = super().build(dtype, seed)
        mixer.method = "newton"
        return mixer


@pytest.fixture
def solved(monkeypatch):
    """How often the iterations have converged, and not."""
    counts = {True: 0, False: 0}
    solve = newton.solve

    def counting(*arguments, **options):
        found = solve(*arguments, **options)
        counts[found.converged] += 1
        return found

    monkeypatch.setattr(newton, "solve", counting)
    return counts


@pytest.mark.parametrize("name", CELLS)
def test_the_contract(name, solved):
    known = Subject.registered(name)
    subject = Solved(known.name, known.cls, known.dim, known.options, known.exceptions)
    test_equality.test_any_split_is_the_whole(subject, 37)
    test_equality.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")
    test_equality.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", torch.float64)
    test_equality.test_one_by_one_is_the_whole(subject, torch.float64)
    test_gradients.test_gradients_against_finite_differences(subject, "packed_with_holes")
    assert solved[True] > 10
    # Diagonals in place of matrices may take more iterations than there are; the loop over time is right then.
    assert not solved[False] or not newton.is_elementwise(subject.build().cell.program)
    assert solved[False] < solved[True] / 4


def test_all_cells_are_here():
    assert {"lstm", "gru", "slstm", "elman", "ind-rnn", "rhn", "para-gru", "para-lstm"} <= set(CELLS)

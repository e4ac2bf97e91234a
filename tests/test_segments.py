"""Segments against a literal reading of their definition, over random documents and padding."""

import itertools
import random

import pytest
import torch
from torch.utils import _pytree as pytree

from tidegate import Segments
from tidegate.segments import reorder, zero_padding


def documents_of(segments: Segments) -> list[list[list[int]]]:
    """Per row, per document, the times of its real tokens; document 0 is the one that continues. Token by token."""
    rows = []
    for starts, valid in zip(segments.starts.tolist(), segments.valid.tolist(), strict=True):
        documents: list[list[int]] = [[]]
        for time, (start, real) in enumerate(zip(starts, valid, strict=True)):
            if start:
                documents.append([])
            if real:
                documents[-1].append(time)
        rows.append(documents)
    return rows


def random_segments(seed: int, batch: int = 4, time: int = 23) -> Segments:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, time, generator=draw) < 0.2
    valid = torch.rand(batch, time, generator=draw) < 0.7
    return Segments(starts, valid)


# -- construction ------------------------------------------------------------------------------------------------------
def test_packed():
    segments = Segments.packed([[2, 1], [1, 1, 2], [1]])
    assert segments.shape == (3, 4)
    assert segments.starts.int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert segments.valid.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    continuing = Segments.packed([[2, 1], [1, 1, 2], [1]], continues=True)
    assert continuing.starts.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("lengths", [[], [[]], [[1], []], [3, 4]])
def test_packed_wants_a_list_of_lengths_for_every_row(lengths):
    with pytest.raises(ValueError, match="lengths: every row needs"):
        Segments.packed(lengths)


@pytest.mark.parametrize("lengths", [[[1, 0]], [[-2]]])
def test_packed_refuses_empty_documents(lengths):
    with pytest.raises(ValueError, match="lengths: every document needs at least one token"):
        Segments.packed(lengths)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padded_takes_any_mask(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    segments = Segments.padded(mask)
    assert segments.valid.int().tolist() == [[0, 1, 1], [1, 0, 1]]
    assert not segments.starts.any()
    assert segments.valid.dtype == segments.starts.dtype == torch.bool


def test_padded_wants_two_axes():
    with pytest.raises(ValueError, match=r"mask: seen shape \(3,\), wanted \(batch, time\)"):
        Segments.padded(torch.ones(3))


def test_the_two_masks_must_fit():
    with pytest.raises(ValueError, match="segments: starts"):
        Segments(torch.zeros(1, 2).bool(), torch.zeros(1, 3).bool())


def test_a_start_on_padding_moves_to_the_next_real_token_and_is_never_lost():
    starts = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]])
    valid = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0]])
    segments = Segments(starts, valid)
    assert segments.starts.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_starts_stand_on_real_tokens_only(seed):
    segments = random_segments(seed)
    assert not (segments.starts & ~segments.valid).any()


def test_and_takes_the_documents_and_the_padding_of_both():
    packed = Segments.packed([[2, 3]])
    both = packed & Segments.padded(torch.tensor([[0, 1, 0, 1, 1]]))
    assert both.starts.int().tolist() == [[0, 1, 0, 1, 0]]
    assert both.valid.int().tolist() == [[0, 1, 0, 1, 1]]
    two = packed & Segments.packed([[4, 1]])
    assert two.starts.int().tolist() == [[1, 0, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"cannot combine shapes \(1, 5\) and \(1, 4\)"):
        packed & Segments.packed([[4]])


@pytest.mark.parametrize("seed", range(5))
def test_and_is_symmetric_and_keeps_every_document_boundary(seed):
    a, b = random_segments(seed), random_segments(seed + 100)
    both, other = a & b, b & a
    assert torch.equal(both.starts, other.starts)
    assert torch.equal(both.valid, a.valid & b.valid)
    for row in range(4):
        # Two real tokens share a document exactly if no start of either lies after the first and up to the second.
        real = both.valid[row].nonzero().flatten().tolist()
        for left, right in itertools.pairwise(real):
            boundary = (a.starts | b.starts)[row, left + 1 : right + 1].any()
            assert bool(both.starts[row, right]) == bool(boundary)


# -- views -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_views_against_the_definition(seed):
    segments = random_segments(seed)
    offset = torch.tensor([5, 0, 7, 2])
    positions, moved, previous = segments.positions(), segments.positions(offset), segments.previous()
    last = segments.in_last_document()
    for row, documents in enumerate(documents_of(segments)):
        assert segments.lengths()[row] == sum(map(len, documents))
        assert last[row].nonzero().flatten().tolist() == documents[-1]
        for number, times in enumerate(documents):
            for order, time in enumerate(times):
                assert segments.documents[row, time] == number
                assert positions[row, time] == order
                assert moved[row, time] == order + (int(offset[row]) if number == 0 else 0)
                assert previous[row, time] == (times[order - 1] if order else -1)
    assert (previous[~segments.valid] == -1).all()
    codes = segments.codes()
    assert codes.dtype == torch.uint8
    assert torch.equal(codes == 2, ~segments.valid)
    assert torch.equal(codes == 1, segments.starts)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_in_time_join_to_the_whole(seed):
    segments = random_segments(seed)
    cuts = sorted(random.Random(seed).sample(range(1, 23), 3))
    pieces = [segments[a:b] for a, b in zip([0, *cuts], [*cuts, 23], strict=True)]
    assert torch.equal(torch.cat([piece.starts for piece in pieces], 1), segments.starts)
    assert torch.equal(torch.cat([piece.valid for piece in pieces], 1), segments.valid)


@pytest.mark.parametrize("seed", range(8))
def test_reversed_against_the_definition(seed):
    """Every document's tokens in the opposite order, none of them continuing."""
    segments = random_segments(seed)
    turned = segments.reversed()
    for documents, opposite in zip(documents_of(segments), documents_of(turned), strict=True):
        wanted = [[22 - time for time in reversed(times)] for times in reversed(documents) if times]
        assert opposite == [[], *wanted]
    for documents, from_state in zip(
        documents_of(turned), documents_of(segments.reversed(continues=True)), strict=True
    ):
        assert from_state == (documents[1:] or [[]])  # the same, but for the first, which continues
    again = turned.reversed()
    assert torch.equal(again.valid, segments.valid)
    for twice, once in zip(documents_of(again), documents_of(segments), strict=True):
        assert twice == [[], *(times for times in once if times)]


def test_reversed_of_what_continues_of_padding_and_of_one_token():
    assert Segments.packed([[2, 1]], continues=True).reversed().starts.int().tolist() == [[1, 1, 0]]
    left = Segments.padded(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])).reversed()
    assert left.valid.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert left.starts.int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert Segments.packed([[1]]).reversed().starts.tolist() == [[True]]


def test_cuts_in_rows():
    segments = random_segments(0)
    assert torch.equal(segments[[2, 0], 3:9].starts, segments.starts[[2, 0], 3:9])
    assert torch.equal(segments[1:2, :].valid, segments.valid[1:2])
    for index in (3, (0, slice(None))):
        with pytest.raises(ValueError, match="index: wanted slices"):
            segments[index]


# -- tokens that go elsewhere ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_a_part_that_is_given_some_of_the_tokens(seed):
    """Its documents are the row's with the others left out, and where its state ends empty the last one has none."""
    segments = random_segments(seed)
    keep = torch.rand(4, 3, 23, generator=torch.Generator().manual_seed(seed)) < 0.15
    part, emptied = segments.routed(keep)
    assert part.shape == (12, 23)
    for row, documents in enumerate(documents_of(segments)):
        for number in range(3):
            kept = [[time for time in times if keep[row, number, time]] for times in documents]
            own = documents_of(part[3 * row + number : 3 * row + number + 1, :])[0]
            assert own == [kept[0], *[times for times in kept[1:] if times]]
            assert bool(emptied[3 * row + number]) == (len(kept) > 1 and not kept[-1])
    single, rows = segments.routed(keep[:, 1])
    assert torch.equal(single.starts, part.starts[1::3])
    assert torch.equal(rows, emptied[1::3])
    with pytest.raises(ValueError, match=r"keep: seen \(rows, time\) = \(4, 22\), wanted \(4, 23\)"):
        segments.routed(keep[:, 0, 1:])


@pytest.mark.parametrize("seed", range(4))
def test_compacted_rows_hold_the_same_documents_without_holes(seed):
    segments = random_segments(seed)
    moved, order, place = segments.compacted()
    x = torch.randn(4, 23, 2, 3)
    dense = reorder(x, order)
    for row, documents in enumerate(documents_of(segments)):
        real = [time for times in documents for time in times]
        assert order[row, : len(real)].tolist() == real
        assert torch.equal(dense[row, : len(real)], x[row, real])
        assert moved.valid[row].tolist() == [True] * len(real) + [False] * (23 - len(real))
        assert [len(times) for times in documents_of(moved[row : row + 1, :])[0]] == [len(t) for t in documents]
    assert torch.equal(reorder(dense, place), x)


# -- padding -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 23), (4, 23, 3), (4, 23, 2, 3)])
def test_zero_padding_stops_values_and_gradients_even_nan(shape):
    segments = random_segments(3)
    x = torch.randn(shape)
    x[~segments.valid] = float("nan")
    x.requires_grad_()
    y = zero_padding(x, segments)
    assert torch.equal(y[segments.valid], x[segments.valid])
    assert not y[~segments.valid].any()
    (y * torch.full_like(y, float("inf"))).nan_to_num().sum().backward()
    assert not x.grad[~segments.valid].any()


def test_zero_padding_checks_what_it_is_given():
    x = torch.zeros(2, 3, 4)
    assert zero_padding(x, None) is x
    with pytest.raises(ValueError, match=r"segments: made for \(batch, time\) = \(1, 3\), but the input is \(2, 3\)"):
        zero_padding(x, Segments.packed([[3]]))
    with pytest.raises(ValueError, match=r"segments: seen Tensor, wanted Segments; of a mask, Segments.padded\(mask\)"):
        zero_padding(x, torch.ones(2, 3).bool())  # type: ignore[arg-type]


# -- pytree ------------------------------------------------------------------------------------------------------------
def test_pytree_round_trip_compile_and_vmap():
    segments = random_segments(1)
    leaves, spec = pytree.tree_flatten(segments)
    assert torch.equal(pytree.tree_unflatten(leaves, spec).starts, segments.starts)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    compiled = torch.compile(lambda s: s[3:20].positions(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(segments), segments[3:20].positions())
    several = pytree.tree_map(lambda *rows: torch.stack(rows), segments, random_segments(2))
    assert torch.equal(torch.vmap(lambda s: s.previous())(several)[1], random_segments(2).previous())


def test_it_can_be_shown_wherever_it_appears():
    segments = random_segments(1)
    assert repr(segments) == "Segments(batch=4, time=23)"
    assert "time" not in repr(pytree.tree_map(lambda leaf: {1: "T"}, segments))
    assert repr(segments.to("meta")) == "Segments(batch=4, time=23)"

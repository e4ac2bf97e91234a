"""Segments: where documents begin, and which positions are real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Segments:
    """The single way to say where documents start and which positions are padding.

    `starts` (B, T) bool is True on the first real token of each document: the state is reset before it. A row whose
    first token carries no start continues from the state that is passed in. `valid` (B, T) bool is False on padding,
    which neither writes to a state or a convolution window nor receives gradient. Padding may stand anywhere; a start
    that is given on padding moves to the next real token.

    >>> Segments.packed([[2, 1], [3]]).starts.int().tolist()
    [[1, 0, 1], [1, 0, 0]]
    >>> Segments.padded(torch.tensor([[0, 1, 1]])).valid.tolist()
    [[False, True, True]]
    """

    def __init__(self, starts: Tensor, valid: Tensor) -> None:
        if starts.shape != valid.shape or starts.ndim != 2:
            raise ValueError(
                f"segments: starts {tuple(starts.shape)} and valid {tuple(valid.shape)} must both be (batch, time)"
            )
        valid = valid != 0
        document = (starts != 0).cumsum(1)
        seen = torch.where(valid, document, 0).cummax(1).values  # last document that had a real token so far
        before = torch.nn.functional.pad(seen, (1, 0))[:, :-1]
        self.starts = valid & (document > before)
        self.valid = valid

    # -- construction ----------------------------------------------------------------------------------------------
    @staticmethod
    def packed(
        lengths: Sequence[Sequence[int]], *, device: torch.device | str | None = None, continues: bool = False
    ) -> Segments:
        """Documents of the given lengths laid end to end in each row; shorter rows are padded on the right.

        With `continues=True` the first document of each row continues from the state passed in.
        Raises ValueError for an empty list or a length below 1.
        """
        if not len(lengths) or not all(isinstance(row, Sequence) and len(row) for row in lengths):
            raise ValueError("lengths: every row needs at least one document length, as in [[30, 1], [31]]")
        if any(length < 1 for row in lengths for length in row):
            raise ValueError(f"lengths: every document needs at least one token, seen {[list(row) for row in lengths]}")
        time = max(sum(row) for row in lengths)
        starts = torch.zeros(len(lengths), time, dtype=torch.bool)
        valid = torch.zeros(len(lengths), time, dtype=torch.bool)
        for row, row_lengths in enumerate(lengths):
            begin = 0
            for document, length in enumerate(row_lengths):
                starts[row, begin] = document > 0 or not continues
                begin += length
            valid[row, :begin] = True
        return Segments(starts.to(device), valid.to(device))

    @staticmethod
    def padded(mask: Tensor) -> Segments:
        """One sequence per row; `mask` (B, T) is true (non-zero) on real tokens."""
        mask = torch.as_tensor(mask)
        if mask.ndim != 2:
            raise ValueError(f"mask: seen shape {tuple(mask.shape)}, wanted (batch, time)")
        return Segments(torch.zeros_like(mask, dtype=torch.bool), mask != 0)

    @classmethod
    def _from_leaves(cls, starts: Tensor, valid: Tensor) -> Segments:
        # Pytree rebuilds trees of things that are no tensors (dimension specs, None); they carry no shape to check.
        segments = object.__new__(cls)
        segments.starts, segments.valid = starts, valid
        return segments

    def __and__(self, other: Segments) -> Segments:
        """Both at once: documents of either, padding of either. A start that falls on padding moves to the next token.

        >>> both = Segments.packed([[2, 2]]) & Segments.padded(torch.tensor([[1, 1, 0, 1]]))
        >>> both.starts.int().tolist()
        [[1, 0, 0, 1]]
        """
        if self.shape != other.shape:
            raise ValueError(f"segments: cannot combine shapes {self.shape} and {other.shape}")
        return Segments(self.starts | other.starts, self.valid & other.valid)

    def routed(self, keep: Tensor) -> tuple[Segments, Tensor]:
        """For a part that is given the tokens in `keep` only: its segments, to which all others are padding, and where
        its state ends empty.

        A document that begins with a token left out begins for the part with its next one. If none is left in this
        call, the state that the part returns is of an earlier document; `emptied` (B,) says in which rows, and
        `torch.where(emptied, 0, state)` is that of the new one.

        keep (B, T), or (B, N, T) for N parts: the segments are then (B * N, T), the parts of a row side by side.

        >>> part, emptied = Segments.packed([[2, 2]]).routed(torch.tensor([[[1, 0, 0, 0], [1, 0, 0, 1]]]))
        >>> part.starts.int().tolist(), emptied.tolist()
        ([[1, 0, 0, 0], [1, 0, 0, 1]], [True, False])
        """
        starts, valid, last = self.starts, self.valid, self.in_last_document()
        if keep.ndim == 3:
            starts, valid, last = (part.repeat_interleave(keep.shape[1], 0) for part in (starts, valid, last))
            keep = keep.flatten(0, 1)
        if keep.shape != valid.shape:
            raise ValueError(f"keep: seen (rows, time) = {tuple(keep.shape)}, wanted {tuple(valid.shape)}")
        part = Segments(starts, valid & (keep != 0))
        return part, starts.any(1) & ~(part.valid & last).any(1)

    def compacted(self) -> tuple[Segments, Tensor, Tensor]:
        """The real tokens moved to the front of their rows, in the order they had: scattered padding breaks the chunks
        that kernels work on, padding at the end costs nothing.

        Returns the segments of the moved tokens; `order` (B, T), from where each position's token comes; and `place`
        (B, T), where each token went: `reorder(x, order)` moves them, `reorder(y, place)` moves them back.

        >>> moved, order, place = Segments.padded(torch.tensor([[0, 1, 0, 1]])).compacted()
        >>> moved.valid.int().tolist(), order.tolist(), place.tolist()
        ([[1, 1, 0, 0]], [[1, 3, 0, 2]], [[2, 0, 3, 1]])
        """
        real = self.valid.cumsum(1)
        count, time = real[:, -1:], torch.arange(self.shape[1], device=self.valid.device).expand_as(real)
        place = torch.where(self.valid, real - 1, count + time - real)
        order = torch.zeros_like(place).scatter(1, place, time)
        starts = torch.zeros_like(self.starts).scatter(1, place, self.starts)
        return Segments._from_leaves(starts, time < count), order, place

    # -- views -----------------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, int]:
        """(batch, time)."""
        return self.valid.shape[0], self.valid.shape[1]

    def __getitem__(self, index: slice | tuple[slice | Tensor | list[int], slice]) -> Segments:
        """`segments[a:b]` cuts time; `segments[rows, a:b]` cuts both. A cut inside a document continues it."""
        rows, time = index if isinstance(index, tuple) else (slice(None), index)
        if not isinstance(time, slice) or isinstance(rows, int):
            raise ValueError("index: wanted slices, as in segments[a:b] or segments[rows, a:b]; a row is [r : r + 1]")
        return Segments._from_leaves(self.starts[rows][:, time], self.valid[rows][:, time])

    def reversed(self, *, continues: bool = False) -> Segments:
        """The same documents read from the right, for `x.flip(1)`: each starts with what was its last real token.

        With `continues=True` the one that is met first continues from a state that comes from the right.

        >>> Segments.packed([[2, 1]]).reversed().starts.int().tolist()
        [[1, 1, 0]]
        """
        document = self.documents.flip(1)
        first = document[:, :1] if continues else torch.full_like(document[:, :1], -1)
        before = torch.cat([first, document], 1)[:, :-1]
        return Segments(document != before, self.valid.flip(1))  # a start on padding moves to the next real token

    def to(self, device: torch.device | str) -> Segments:
        """The same segments on another device."""
        return Segments._from_leaves(self.starts.to(device), self.valid.to(device))

    @property
    def documents(self) -> Tensor:
        """(B, T) running document number; 0 is the one that continues from the state passed in."""
        return self.starts.cumsum(1)

    def positions(self, offset: Tensor | None = None) -> Tensor:
        """(B, T) index of each real token in its document; `offset` (B,) tokens of document 0 came before."""
        order = self.valid.cumsum(1) - 1  # index among the row's real tokens
        first = torch.where(self.starts, order, -1).cummax(1).values  # order of the current document's first token
        position = order - first.clamp(min=0)
        if offset is not None:
            position = position + torch.where(first < 0, offset[:, None], 0)
        return position.clamp(min=0)

    def previous(self) -> Tensor:
        """(B, T) time index of the previous real token of the same document, -1 if there is none in this call."""
        time = torch.arange(self.shape[1], device=self.valid.device)
        seen = torch.where(self.valid, time, -1).cummax(1).values
        before = torch.nn.functional.pad(seen, (1, 0), value=-1)[:, :-1]
        return torch.where(self.starts | ~self.valid, -1, before)

    def in_last_document(self) -> Tensor:
        """(B, T) real tokens of the document that the final state belongs to."""
        documents = self.documents
        return self.valid & (documents == documents[:, -1:])

    def lengths(self) -> Tensor:
        """(B,) number of real tokens in each row."""
        return self.valid.sum(1)

    def zero_padding(self, x: Tensor) -> Tensor:
        """`x` (B, T, ...) with zeros on padding, whatever stood there (NaN included), and no gradient to it."""
        valid = self.valid.reshape(*self.valid.shape, *[1] * (x.ndim - 2))
        return torch.where(valid, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def codes(self) -> Tensor:
        """(B, T) uint8 for kernels: 0 an ordinary token, 1 the first of a document, 2 padding."""
        return torch.where(self.valid, self.starts.to(torch.uint8), torch.full_like(self.valid, 2, dtype=torch.uint8))

    def __repr__(self) -> str:
        if not isinstance(self.valid, Tensor):  # in a pytree of something else, as the dynamic shapes of an export
            return f"Segments(starts={self.starts!r}, valid={self.valid!r})"
        return f"Segments(batch={self.shape[0]}, time={self.shape[1]})"


def zero_padding(x: Tensor, segments: Segments | None) -> Tensor:
    """`segments.zero_padding(x)`, after checking that the shapes belong together; `x` itself without segments."""
    if segments is None:
        return x
    if not isinstance(segments, Segments):
        raise ValueError(f"segments: seen {type(segments).__name__}, wanted Segments; of a mask, Segments.padded(mask)")
    if segments.shape != tuple(x.shape[:2]):
        raise ValueError(
            f"segments: made for (batch, time) = {segments.shape}, but the input is {tuple(x.shape[:2])}; "
            "cut them together with segments[a:b]"
        )
    return segments.zero_padding(x)


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """y[b, t] = x[b, index[b, t]]: other tokens of the same row. x, y (B, T, ...), index (B, T)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, index.shape)


pytree.register_pytree_node(
    Segments,
    lambda segments: ([segments.starts, segments.valid], None),
    lambda leaves, _: Segments._from_leaves(*leaves),
    serialized_type_name="tidegate.Segments",
    to_dumpable_context=lambda _: None,
    from_dumpable_context=lambda _: None,
    flatten_with_keys_fn=lambda s: ([(pytree.GetAttrKey(key), getattr(s, key)) for key in ("starts", "valid")], None),
)

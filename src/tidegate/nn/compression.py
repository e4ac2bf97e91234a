"""Compression: a module computes only the tokens that need it, moved together, and its results are put back."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose


class Compression:
    """The active tokens of every row side by side, in order: (B, T, ...) -> (B, L, ...), and back.

    L = `length` is the most active tokens of a row, 0 if there are none; shorter rows are filled up with zeros behind.

    >>> few = Compression(torch.tensor([[False, True, True], [True, False, False]]))
    >>> x = torch.arange(1, 7).view(2, 3)
    >>> few.compress(x).tolist()
    [[2, 3], [4, 0]]
    >>> few.extract(few.compress(x)).tolist()
    [[0, 2, 3], [4, 0, 0]]
    """

    def __init__(self, active: Tensor) -> None:
        count = active.sum(1)
        self.batch, self.time = active.shape
        self.length = int(count.max()) if count.numel() else 0
        self.full = bool((count == self.length).all())  # no row needs filling
        self._token = active.flatten().nonzero().squeeze(1)  # where each active token is in (B * T)
        order = (active.cumsum(1) - 1).flatten()[self._token]
        self._slot = self._token // self.time * self.length + order  # and in (B * L)

    def compress(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, L, ...)."""
        rows = x.flatten(0, 1).index_select(0, self._token)
        if not self.full:
            rows = x.new_zeros(self.batch * self.length, *x.shape[2:]).index_copy(0, self._slot, rows)
        return rows.unflatten(0, (self.batch, self.length))

    def extract(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B, T, ...), zero where no token was active."""
        rows = x.flatten(0, 1)
        rows = rows if self.full else rows.index_select(0, self._slot)
        spread = x.new_zeros(self.batch * self.time, *x.shape[2:]).index_copy(0, self._token, rows)
        return spread.unflatten(0, (self.batch, self.time))


def may_compress(x: Tensor) -> bool:
    """Whether a program may depend on the values of tensors: on plain ones, outside of tracing and transforms."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    mapped = torch._C._functorch.peek_interpreter_stack() is not None
    return not (traced or mapped or x.is_meta) and choose(x) != "reference"

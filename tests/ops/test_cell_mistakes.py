"""What ops.Cell says to equations that are wrong, and to arguments that do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.ops.cells import arguments
from tidegate import Segments, mixers
from tidegate.ops.cell import Cell

MISTAKES = [  # the equations, what is said, and what the marks stand under
    ("h = tanh(W @ x", "line 1 does not read", None),
    ("h = W @ x\n\nh = h h", "line 3 does not read", "h"),
    ("h = x; c = h", "more than one equation", None),
    ("h + x", "line 1 is no equation", "h + x"),
    ("h = c = x", "line 1 is no equation", "h = c = x"),
    ("h, c = x", "one name", "h, c"),
    ("tanh = h + x", "'tanh' has a meaning already", "tanh"),
    ("h = W @ x\nW = h", "'W' has a meaning already", "W"),
    ("h = b * x\nb = h", "'b' has a meaning already", "b"),
    ("x = h", "'x' has a meaning already", "x"),
    ("a_ = x\nh = a_", "names do not end in '_'", "a_"),
    ("h = x * a_", "names do not end in '_'", "a_"),
    ("h = 3", "the same number at all times", "3"),
    ("h = U @ 2 + x", "differs between them", "2"),
    ("k = 2\nh = U @ k + x", "differs between them", "k"),
    ("h = mean(2) + x", "differs between them", "2"),
    ("h = 'a' + x", "wanted numbers, names", "'a'"),
    ("h = True + x", "wanted numbers, names", "True"),
    ("h = 1e999 * x", "wanted numbers, names", "1e999"),
    ("h = x.y", "wanted numbers, names", "x.y"),
    ("h = tanh * x", "'tanh' is a function", "tanh"),
    ("h = W @ x + W", "'W' is a matrix", "W"),
    ("h = x * y", "'y', the output", "y"),
    ("h = x ** 9", "a whole power from 2 to 8", "9"),
    ("h = x ** h", "a whole power from 2 to 8", "h"),
    ("h = x / 0", "division by zero", "0"),
    ("h = x % 2", "wanted + - * /", "x % 2"),
    ("h = x * U @ h", "wanted a * (U @ h)", "x * U"),
    ("h = tanh(h) @ x", "the left side of @", "tanh(h)"),
    ("h = h @ x", "'h' is a quantity already", "h"),
    ("h = b + b @ x", "'b' is a vector already", "b"),
    ("h = U @ h + U @ x", "'U' is applied to a state elsewhere", "U @ x"),
    ("h = U @ x + U @ h", "'U' is applied to x elsewhere", "U @ h"),
    ("h = U @ h + U @ tanh(h)", "'U' is applied to something else", "U @ tanh(h)"),
    ("h = tanh(a=x)", "a call such as tanh(a)", "tanh(a=x)"),
    ("h = x.tanh()", "a call such as tanh(a)", "x.tanh()"),
    ("h = mean()", "mean takes at least one", "mean()"),
    ("h = tahn(x)", "no function 'tahn', did you mean 'tanh'?", "tahn"),
    ("h = tanh(x, h)", "tanh takes 1 argument, seen 2", "tanh(x, h)"),
    ("h = maximum(x)", "maximum takes 2 arguments, seen 1", "maximum(x)"),
    ("h = log(-1) * x", "no such number", "log(-1)"),
    ("h = where(x, h, 2)", "with one comparison", "where(x, h, 2)"),
    ("h = where(x < h < 2, h, 2)", "with one comparison", "where(x < h < 2, h, 2)"),
    ("h = where(x == h, h, 2)", "one of < <= > >=", "x == h"),
    ("β = x\nh = tanh(β * h + f(β))", "there is no function 'f'", "f"),
]


@pytest.mark.parametrize(("text", "message", "marked"), MISTAKES)
def test_mistakes_are_quoted_and_marked(text, message, marked):
    with pytest.raises(ValueError, match=r"^equations: ") as error:
        Cell(text, "h")
    said, line, marks = str(error.value).split("\n")
    assert message in said
    assert line.strip() in [part.strip() for part in text.splitlines()]
    if marked is not None:
        assert line[marks.index("^") : marks.index("^") + marks.count("^")] == marked


def test_mistakes_of_the_whole():
    for text, states, message in (
        ("h = x", "", "states: seen none"),
        ("h = x", "h h", "states: seen 'h' twice"),
        ("h = x", "h 2", "states: seen '2', wanted names"),
        ("h = x", "h lambda", "states: seen 'lambda', wanted names"),
        ("h = x", "h x", "states: 'x' has a meaning"),
        ("h = x", "h tanh", "states: 'tanh' has a meaning"),
        ("h = x", "h c", "none gives a new 'c'"),
        ("h = x + c", "h c", "none gives a new 'c'"),
        ("a = tanh(h)\nh = x", "h", "nothing depends on this\n  a = tanh(h)\n  ^"),
        ("h = x + 0 * b", "h", "'b' cancels out"),
        ("h = x + 0 * (W @ x)", "h", "'W' cancels out"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Cell(text, states)


def test_arguments_are_checked():
    cell = mixers.build("lstm", 4, peephole=True).cell
    inputs, matrices, vectors, state = arguments(cell, 2, 3, 2, 4)
    for said, wrong in (
        (r"inputs: seen shape \(3, 4, 4\), wanted \(batch, time >= 1, 4, dim\) for W_i, W_f", dict(inputs=inputs[0])),
        (r"inputs: seen shape \(2, 0, 4, 4\)", dict(inputs=inputs[:, :0])),
        (r"inputs: seen shape \(2, 3, 3, 4\)", dict(inputs=inputs[:, :, :3])),
        (r"inputs: seen torch.int64, wanted real numbers", dict(inputs=inputs.long())),
        (r"inputs: seen torch.complex128, wanted real numbers", dict(inputs=inputs.to(torch.complex128))),
        (r"matrices: seen shape \(0, 1, 4, 4\), wanted \(4, heads, d, d\) for U_i, U_f, U_", dict(matrices=None)),
        (r"matrices: seen shape \(3, 2, 2, 2\)", dict(matrices=matrices[:3])),
        (
            r"matrices: seen shape \(4, 1, 2, 2\), wanted blocks of \(d, d\) with heads \* d = 4",
            dict(matrices=matrices[:, :1]),
        ),
        (r"matrices: seen shape \(4, 2, 2, 1\), wanted blocks", dict(matrices=matrices[..., :1])),
        (r"vectors: seen shape \(0, 4\), wanted \(3, 4\) for p_i, p_f, p_o", dict(vectors=None)),
        (r"vectors: seen shape \(3, 3\)", dict(vectors=vectors[:, :3])),
        (r"state: seen shape \(1, 2, 4\), wanted \(2, 2, 4\) for h, c", dict(state=state[:1])),
        (r"segments: ", dict(segments=Segments.packed([[4]]))),
        (r"gradient_clip: seen 0, wanted more than 0", dict(gradient_clip=0)),
        (r"gradient_clip: seen nan", dict(gradient_clip=float("nan"))),
        (r"truncate: seen 0, wanted a whole number of tokens", dict(truncate=0)),
        (r"truncate: seen 2.5, wanted a whole number of tokens", dict(truncate=2.5)),
        (r"projected_dim: this cell has no state that is a product", dict(projected_dim=2)),
    ):
        call: dict[str, Any] = dict(inputs=inputs, matrices=matrices, vectors=vectors, state=state)
        with pytest.raises(ValueError, match=rf"^{said}"):
            cell(**{**call, **wrong})


def test_projections_are_checked():
    cell = mixers.build("lstm", 3, hidden_size=4).cell
    for heads, projected_dim in ((2, 2), (1, 0), (1, 5), (1, 2.5)):
        wanted = f"seen {projected_dim} for {heads} heads of {4 // heads}, wanted one head and 1 to {4 // heads}"
        with pytest.raises(ValueError, match=f"^projected_dim: {wanted}"):
            cell(*arguments(cell, 2, 3, heads, 4), projected_dim=projected_dim)

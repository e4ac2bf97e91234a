"""ops.Cell for any equations: unusual ones and random ones, against Python's own reading of the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.contract.helpers import assert_near
from tests.ops.cells import arguments, layouts, loop, python_step, results, uncompiled
from tidegate.ops.cell import Cell


def test_the_order_of_names_is_that_of_the_equations():
    cell = Cell("a = V @ x + q * (B @ s)\ns = tanh(a + W @ x + p * x + A @ s + q)", "s")
    assert (cell.inputs, cell.matrices, cell.vectors) == (("V", "W", "x"), ("B", "A"), ("q", "p"))


def test_names_of_the_written_code_are_free_to_be_used():
    text = """
        t0 = tanh(W @ x + mean(h) * mean0)
        e0 = t0 * (U @ (t0 * h))
        d_h = e0 * flow_h + share * step
        h_new = d_h * product + states * inputs
        d_h_new = h_new + where_negative * h
        h = tanh(d_h_new + U_of_e0 * full + lambda_)
    """.replace("lambda_", "log1p")
    cell = Cell(text, "h")
    given = arguments(cell, 3, 4, 2, 4)
    wanted = results(lambda *x: loop(python_step(cell), *x), given)
    assert_near(results(cell, given), wanted, 1e-9, "the operator and the text")
    assert_near(uncompiled(cell, given), wanted, 1e-9, "uncompiled kernels and the text")


EDGES = {
    "a shift register": ("b = a\na = W @ x\n", "a b"),
    "a state that is an old one": ("h = c\nc = tanh(W @ x + U @ h)", "h c"),
    "no input": ("h = tanh(U @ h) + b", "h"),
    "no dependence on the past": ("h = tanh(W @ x)", "h"),
    "vectors alone": ("h = sigmoid(b)\ny = h * x", "h"),
    "means alone": ("h = mean(h, x)\ny = U @ mean(h)", "h"),
    "a mean of a product": ("h = h * mean(U @ h) + U @ h - mean(b)", "h"),
    "a mean of numbers and the input": ("h = mean(W @ x) * h + mean(W @ x, x)", "h"),
    "a product twice": ("a = U @ h\nh = a * (U @ h) + W @ x + V @ (U @ h)", "h"),
    "an output apart": ("h = tanh(W @ x + U @ h)\ny = V @ (h * V_x)", "h"),
    "reassigned": ("a = W @ x\na = a * h\na = a + U @ a\nh = tanh(a)\nh = h * a", "h"),
    "plain numbers": (
        "k = tanh(0.7)\nk = exp(k) * 0.5 * 3\nh = sigmoid(0) * h / k + where(x < 0, 0.1, 0.2) + where(1 < 2, x, h)",
        "h",
    ),
}


@pytest.mark.parametrize("edge", EDGES)
def test_unusual_cells(edge):
    cell = Cell(*EDGES[edge])
    for batch, heads in ((2, 1), (9, 2)):
        for segments in layouts(batch, 4):
            given = arguments(cell, batch, 4, heads if cell.matrices else 1, 6)
            wanted = results(lambda *x, s=segments: loop(python_step(cell), *x, s), given)
            assert_near(results(lambda *x, s=segments: cell(*x, segments=s), given), wanted, 1e-9, edge)
            assert_near(uncompiled(cell, given, segments), wanted, 1e-9, f"{edge}, uncompiled")


# -- any cell ----------------------------------------------------------------------------------------------------------
@st.composite
def programs(draw: st.DrawFn) -> tuple[str, str]:
    """A few equations over all there is to write, and the names of their states."""
    states = ["h", "c"][: draw(st.integers(1, 2))]
    names, counts = [*states], {"W": 0, "U": 0}

    def pick(options):
        return draw(st.sampled_from(options))

    def matrix(kind: str) -> str:
        counts[kind] += 1
        return f"{kind}{counts[kind]}"

    def expression(depth: int) -> str:
        leaves = ["name", "name", "vector", "input", "x", "number"]
        kind = pick(
            leaves if depth == 0 else [*leaves[:3], "sum", "product", "call", "call", "matrix", "mean", "where", "two"]
        )

        def inner() -> str:
            return expression(depth - 1)

        if kind == "name":
            return pick(names)
        if kind == "vector":
            return pick(["p", "q"])
        if kind == "input":
            return f"{matrix('W')} @ x" if draw(st.booleans()) or not counts["W"] else "W1 @ x"
        if kind == "x":
            return "x"
        if kind == "number":
            return pick(["0.5", "2", "1.25"])
        if kind == "sum":
            return f"({inner()} {pick('+-')} {inner()})"
        if kind == "product":
            return pick([f"({inner()}) * ({inner()})", f"({inner()}) / (1.5 + ({inner()}) ** 2)", f"-({inner()}) ** 3"])
        if kind == "matrix":
            return f"({matrix('U')} @ ({inner()} + {pick(names)}))"
        if kind == "mean":
            return pick([f"mean({inner()} + {pick(names)})", f"mean({inner()} * x, {pick(names)})"])
        if kind == "where":
            return f"where({inner()} {pick(['<', '<=', '>', '>='])} {inner()}, {inner()}, {inner()})"
        if kind == "two":
            return pick(
                [f"maximum({inner()}, {inner()})", f"minimum({inner()}, {inner()})", f"clip({inner()}, -0.7, 0.9)"]
            )
        function = pick(["sigmoid", "tanh", "softplus", "log_sigmoid", "relu", "abs", "exp", "log", "sqrt"])
        safe = {"exp": "exp(tanh({}))", "log": "log(1.1 + ({}) ** 2)", "sqrt": "sqrt(0.3 + ({}) ** 2)"}
        return safe.get(function, function + "({})").format(inner())

    lines = []
    for number in range(draw(st.integers(0, 2))):
        lines.append(f"a{number} = tanh({expression(2)})")
        names.append(f"a{number}")
    for state in states:
        lines.append(f"{state} = tanh({expression(3)} + {' + '.join(names)})")
    if draw(st.booleans()):
        lines.append(f"y = {expression(2)}")
    return "\n".join(lines), " ".join(states)


def made(text: str, states: str) -> Cell | None:
    """None where what was drawn is no cell, as a name cancelled out."""
    try:
        return Cell(text, states)
    except ValueError as error:
        if any(reason in str(error) for reason in ("cancels out", "depends on", "number")):
            return None
        raise


@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(program=programs(), seed=st.integers(0, 1000))
def test_any_cell_equals_its_text(program, seed):
    """The step in PyTorch, and kernels as they are written, against Python that reads the same equations."""
    cell = made(*program)
    assume(cell is not None)
    torch.manual_seed(seed)
    given = arguments(cell, 2, 3, 1 + seed % 2 if cell.matrices else 1, 4)
    segments = list(layouts(2, 3))[seed % 4]
    wanted = results(lambda *x: loop(python_step(cell), *x, segments), given)
    found = results(lambda *x: cell(*x, segments=segments), given)
    assert_near(found, wanted, 1e-9, "the operator and the text")
    assert_near(uncompiled(cell, given, segments), wanted, 1e-9, "uncompiled kernels and the text")

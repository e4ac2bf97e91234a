"""ops.Cell against the equations written out, against Python's own reading of the text, and against its kernels."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tidegate
from tests.contract.helpers import assert_near
from tests.ops.cells import arguments, blocks, layouts, loop, python_step, results, uncompiled
from tidegate import Segments, mixers
from tidegate.ops.cell import Cell, numba_cpu

sigmoid, tanh, exp = torch.sigmoid, torch.tanh, torch.exp
KERNEL_TOLERANCE = 3e-6  # float32 against float64, of the largest magnitude; 25 roundings
NORM_TOLERANCE = 1e-5  # through norms, which divide by the spread of what they are given


# -- the cells, step by step -------------------------------------------------------------------------------------------
# n.W_i is W_i @ x, n.U_i(h) is U_i @ h, n.p_i is a vector.
def lstm(n, h, c):
    i, f, o = sigmoid(n.W_i + n.U_i(h)), sigmoid(n.W_f + n.U_f(h)), sigmoid(n.W_o + n.U_o(h))
    c = f * c + i * tanh(n.W_g + n.U_g(h))
    h = o * tanh(c)
    return h, (h, c)


def peephole(n, h, c):
    i, f = sigmoid(n.W_i + n.U_i(h) + n.p_i * c), sigmoid(n.W_f + n.U_f(h) + n.p_f * c)
    new = f * c + i * tanh(n.W_g + n.U_g(h))
    h = sigmoid(n.W_o + n.U_o(h) + n.p_o * new) * tanh(new)
    return h, (h, new)


def layer_norm(n, h, c):
    u = torch.stack([n.U_i(h), n.U_f(h), n.U_g(h), n.U_o(h)]).unflatten(-1, (n.heads, -1))  # (4, B, H, d)
    centred = u - u.mean((0, 3), keepdim=True)
    u = (centred / (centred.square().mean((0, 3), keepdim=True) + 1e-5).sqrt()).flatten(-2)
    i, f, o = (
        sigmoid(w + gain * u[k]) for w, gain, k in ((n.W_i, n.gain_i, 0), (n.W_f, n.gain_f, 1), (n.W_o, n.gain_o, 3))
    )
    c = f * c + i * tanh(n.W_g + n.gain_g * u[2])
    d = c.unflatten(-1, (n.heads, -1))
    d = torch.nn.functional.layer_norm(d, d.shape[-1:], eps=1e-5).flatten(-2)
    h = o * tanh(n.gain * d + n.shift)
    return h, (h, c)


def gru_after(n, h):
    r, z = sigmoid(n.W_r + n.U_r(h)), sigmoid(n.W_z + n.U_z(h))
    h = (1 - z) * tanh(n.W_n + r * (n.U_n(h) + n.b_n)) + z * h
    return h, (h,)


def gru_before(n, h):
    r, z = sigmoid(n.W_r + n.U_r(h)), sigmoid(n.W_z + n.U_z(h))
    h = (1 - z) * tanh(n.W_n + n.U_n(r * h)) + z * h
    return h, (h,)


def slstm(n, h, c, norm, m):
    i, forget = n.W_i + n.U_i(h), torch.nn.functional.logsigmoid(n.W_f + n.U_f(h))
    new = torch.where(norm > 0, torch.maximum(forget + m, i), i)
    f, i = torch.where(norm > 0, exp(forget + m - new), 0.0), exp(i - new)
    c, norm = f * c + i * tanh(n.W_z + n.U_z(h)), f * norm + i
    h = sigmoid(n.W_o + n.U_o(h)) * c / norm
    return h, (h, c, norm, new)


def indrnn(n, h):
    h = torch.relu(n.W_h + n.u * h)
    return h, (h,)


def elman(n, h):
    h = tanh(n.W_h + n.U_h(h))
    return h, (h,)


def rhn(n, s):
    """Two layers deep within a token: the second's matrices are applied to what the first one has made."""
    t = sigmoid(n.W_t + n.R_t1(s))
    s = tanh(n.W_h + n.R_h1(s)) * t + s * (1 - t)
    t = sigmoid(n.R_t2(s) + n.b_t2)
    s = tanh(n.R_h2(s) + n.b_h2) * t + s * (1 - t)
    return s, (s,)


CELLS = {  # those of mixers have the same text, so that their kernels are compiled once for all tests
    "lstm": (mixers.build("lstm", 4).cell, lstm),
    "peephole": (mixers.build("lstm", 4, peephole=True).cell, peephole),
    "layer-norm": (mixers.build("lstm", 4, layer_norm=True).cell, layer_norm),
    "gru-after": (mixers.build("gru", 4).cell, gru_after),
    "gru-before": (mixers.build("gru", 4, reset="before").cell, gru_before),
    "slstm": (mixers.build("slstm", 4).cell, slstm),
    "indrnn": (mixers.build("ind-rnn", 4).cell, indrnn),
    "elman": (mixers.build("elman", 4).cell, elman),
    "rhn": (mixers.build("rhn", 4, depth=2).cell, rhn),
}
NAMES = pytest.mark.parametrize("name", CELLS)


def literal(name):
    """The hand-written step, called as every step is."""
    cell, function = CELLS[name]

    def step(inputs, matrices, vectors, states):
        names: dict[str, Any] = dict(zip(cell.inputs, inputs, strict=True)) | dict(
            zip(cell.vectors, vectors, strict=True)
        )
        for matrix, U in zip(cell.matrices, matrices, strict=True):
            names[matrix] = lambda q, U=U: blocks(U, q)
        return function(SimpleNamespace(**names, heads=matrices.shape[1]), *states)

    return step


# -- helper ------------------------------------------------------------------------------------------------------------
def kernel(cell, given, segments=None, **options):
    with tidegate.backend("numba"):
        return results(lambda *leaves: cell(*leaves, segments=segments, **options), given, torch.float32)


# -- equality ----------------------------------------------------------------------------------------------------------
@NAMES
def test_equals_the_equations(name):
    """The step in PyTorch, in float64: outputs, final state and the gradients of everything."""
    cell, step = CELLS[name][0], literal(name)
    for batch, time, heads, dim in ((3, 5, 2, 6), (1, 1, 1, 3), (2, 2, 1, 1)):
        for segments in layouts(batch, time):
            given = arguments(cell, batch, time, heads, dim)
            wanted = results(lambda *leaves, s=segments: loop(step, *leaves, s), given)
            found = results(lambda *leaves, s=segments: cell(*leaves, segments=s), given)
            assert_near(found, wanted, 1e-9, "the operator and the equations")
            python = results(lambda *leaves, s=segments: loop(python_step(cell), *leaves, s), given)
            assert_near(python, wanted, 1e-9, "the text read by Python and the equations")
            assert_near(uncompiled(cell, given, segments), wanted, 1e-9, "uncompiled kernels and the equations")


@NAMES
def test_kernels_equal_the_equations(name):
    cell, step = CELLS[name][0], literal(name)
    for batch, time, heads, dim in ((3, 9, 2, 14), (9, 4, 1, 20), (1, 1, 1, 3), (2, 3, 4, 4)):
        for segments in layouts(batch, time):
            given = arguments(cell, batch, time, heads, dim)
            wanted = results(lambda *leaves, s=segments: loop(step, *leaves, s), given)
            tolerance = NORM_TOLERANCE if name == "layer-norm" else KERNEL_TOLERANCE
            assert_near(kernel(cell, given, segments), wanted, tolerance, "kernels and the equations")


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 31, 32, 33, 129])
def test_blocks_of_every_size(batch):
    """8, 16 and 32 rows, whole and broken up."""
    cell = CELLS["gru-before"][0]
    for segments in layouts(batch, 3):
        given = arguments(cell, batch, 3, 2, 6)
        wanted = results(lambda *leaves, s=segments: loop(literal("gru-before"), *leaves, s), given)
        assert_near(kernel(cell, given, segments), wanted, KERNEL_TOLERANCE, f"{batch} rows")


@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 3), (3, 7), (1, 8), (2, 20), (1, 33), (5, 1)])
def test_heads_of_every_width(heads, width):
    cell = CELLS["layer-norm"][0]
    given = arguments(cell, 2, 3, heads, heads * width)
    if width == 1:  # what is normalised over one channel is nothing, and its gradient rounding
        given[1] = torch.zeros_like(given[1])
    wanted = results(lambda *leaves: loop(literal("layer-norm"), *leaves), given)
    assert_near(kernel(cell, given), wanted, NORM_TOLERANCE, f"{heads} heads of {width}")


@pytest.mark.parametrize("dim", [127, 256, 384, 389])
def test_channels_that_never_meet_are_taken_apart(dim):
    """In problems of 128 or more, where they divide the channels."""
    cell = CELLS["indrnn"][0]
    for segments in layouts(9, 3):
        given = arguments(cell, 9, 3, 1, dim)
        wanted = results(lambda *leaves, s=segments: loop(literal("indrnn"), *leaves, s), given)
        assert_near(kernel(cell, given, segments), wanted, KERNEL_TOLERANCE, f"{dim} channels")


def test_projected_states_have_fewer_channels():
    """As if the rest of their matrices were zero, which nobody computes with."""
    cell = mixers.build("lstm", 3, hidden_size=4, output_activation=False).cell
    assert cell.projected == ("h",)
    for batch, time, dim, narrow in ((2, 3, 6, 4), (9, 4, 20, 17), (1, 2, 3, 1), (3, 2, 5, 5)):
        inside = torch.ones(5, 1, dim, dim)
        inside[-1, :, narrow:] = 0  # R gives that many channels
        inside[:-1, :, :, narrow:] = 0  # U_i, U_f, U_g, U_o take them
        for segments in layouts(batch, time):
            inputs, matrices, vectors, state = arguments(cell, batch, time, 1, dim)
            state[:, 0, narrow:] = 0
            given = [inputs, matrices * inside, vectors, state]
            wanted = results(lambda *x, s=segments: loop(python_step(cell), *x, s), given)
            wanted["d matrices"] = wanted["d matrices"] * inside
            for name in ("y", "state", "d inputs"):
                assert wanted[name].isfinite().all(), name
            hidden = torch.cat([torch.arange(dim) < narrow, torch.ones(dim, dtype=torch.bool)]).unflatten(0, (2, dim))

            def seen(found, hidden=hidden):
                """The gradient of what a projected state does not have is left open."""
                return {**found, "d state": torch.where(hidden, found["d state"], 0)}

            def run(*x, s=segments, narrow=narrow):
                return cell(*x, segments=s, projected_dim=narrow)

            assert_near(seen(results(run, given)), seen(wanted), 1e-9, "the operator and the text")
            assert_near(
                seen(uncompiled(cell, given, segments, narrow=narrow)), seen(wanted), 1e-9, "uncompiled kernels"
            )
            with tidegate.backend("numba"):
                found = results(run, given, torch.float32)
            assert_near(seen(found), seen(wanted), KERNEL_TOLERANCE, "kernels")


@pytest.mark.parametrize(
    ("text", "states", "projected"),
    [
        ("c = tanh(W @ x + U @ h)\nh = R @ c", "h c", ("h",)),
        ("c = tanh(W @ x + U @ h)\nh = R @ c\nc = c + V @ h", "h c", ("h",)),
        ("c = tanh(W @ x + U @ h)\nh = R @ c\ny = h + c", "h c", ()),
        ("c = tanh(W @ x + U @ h)\nr = R @ c\nh = r\nc = c * r", "h c", ()),
        ("c = tanh(W @ x + h)\nh = R @ c", "h c", ()),
        ("h = R @ tanh(W @ x + mean(h))", "h", ()),
        ("h = R @ tanh(W @ x + U @ h)", "h", ("h",)),
        ("c = tanh(W @ x + U @ h + V @ k)\nh = R @ c\nk = Q @ c", "h k c", ("h", "k")),
    ],
)
def test_which_states_are_projected(text, states, projected):
    assert Cell(text, states).projected == projected


def test_splits_hand_the_state_on():
    cell = CELLS["slstm"][0]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, KERNEL_TOLERANCE)):
        given = arguments(cell, 3, 9, 2, 6)

        def pieces(inputs, *rest, cuts=(1, 4, 5, 8)):
            *weights, state = rest
            outputs = []
            for a, b in zip((0, *cuts), (*cuts, 9), strict=True):
                y, state = cell(inputs[:, a:b], *weights, state)
                outputs.append(y)
            return torch.cat(outputs, 1), state

        assert_near(results(pieces, given, dtype), results(cell, given, dtype), tolerance, "pieces and the whole")


def test_a_state_is_zero_if_there_is_none():
    cell = CELLS["lstm"][0]
    for dtype in (torch.float64, torch.float32):
        inputs, matrices, vectors, state = (x.to(dtype) for x in arguments(cell))
        for seen, wanted in zip(cell(inputs, matrices), cell(inputs, matrices, vectors, 0 * state), strict=True):
            assert torch.equal(seen, wanted)


def test_half_precision_is_computed_in_float32():
    cell = CELLS["gru-after"][0]
    for dtype in (torch.bfloat16, torch.float16):
        given = [x.to(dtype) for x in arguments(cell)]
        y, last = cell(*given)
        wide, wide_last = cell(*(x.float() for x in given))
        assert (y.dtype, last.dtype) == (dtype, torch.float32)
        assert torch.equal(y, wide.to(dtype))
        assert torch.equal(last, wide_last)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_makes_no_difference(default):
    cell = CELLS["lstm"][0]
    given = arguments(cell)
    wanted = kernel(cell, given)
    torch.set_default_dtype(default)
    try:
        with tidegate.backend("numba"):
            leaves = [x.float().requires_grad_() for x in given]
            y, last = cell(*leaves)
            found = torch.autograd.grad((y.sum(), last.sum()), leaves, materialize_grads=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, wanted["y"])
    assert torch.equal(last, wanted["state"])
    assert all(g.dtype == torch.float32 for g in found)


def test_gradients_are_those_of_finite_differences():
    given = [x.requires_grad_() for x in arguments(CELLS["gru-before"][0], 2, 3, 2, 4)]
    segments = Segments.packed([[2, 1], [3]], continues=True)
    assert torch.autograd.gradcheck(lambda *leaves: CELLS["gru-before"][0](*leaves, segments=segments), given)


def test_derivatives_of_derivatives():
    """float64, and float32 that begins in a kernel."""
    cell, segments = CELLS["elman"][0], Segments.packed([[2, 1], [3]], continues=True)
    given = [x.requires_grad_() for x in arguments(cell, 2, 3, 1, 3)]
    assert torch.autograd.gradgradcheck(lambda *leaves: cell(*leaves, segments=segments), given)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        y, last = cell(*leaves, segments=segments)
        first = torch.autograd.grad((y * y).sum() + (last**3).sum(), leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, materialize_grads=True)
        found.append({str(n): g for n, g in enumerate([*first, *second])})
    assert_near(found[1], found[0], KERNEL_TOLERANCE, "derivatives of kernels")


# -- what flows back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("clip", "cut"), [(1 / 64, None), (None, 3), (1 / 16, 2), (None, 1)])
def test_what_flows_back_can_be_clipped_and_cut(clip, cut):
    """By the definition: step by step back, with what flows into the states before a token bounded, or dropped."""
    cell, step = CELLS["lstm"][0], literal("lstm")
    given = arguments(cell, 2, 7, 2, 4)
    segments = Segments.packed([[2, 5], [7]], continues=True) & Segments.padded(
        torch.tensor([[1, 0, 1, 1, 0, 1, 1]] * 2)
    )
    for layout in (None, segments):
        found = results(lambda *x, s=layout: cell(*x, segments=s, gradient_clip=clip, truncate=cut), given)
        inputs, matrices, vectors, state = (x.clone().requires_grad_() for x in given)
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(found[k].shape, generator=generator, dtype=torch.float32).double() for k in ("y", "state")
        ]

        states, steps = [state], []
        for t in range(7):
            before = states[-1].detach().requires_grad_()
            piece = None if layout is None else layout[t : t + 1]
            y, after = loop(step, inputs[:, t : t + 1], matrices, vectors, before, piece)
            steps.append((before, y, after))
            states.append(after)
        flow, total = weights[1], [0.0, 0.0, 0.0]
        for t in reversed(range(7)):
            before, y, after = steps[t]
            outputs, gradients = (y, after), (weights[0][:, t : t + 1], flow)
            leaves = (before, inputs, matrices, vectors)
            change, *own = torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)
            total = [a + b for a, b in zip(total, own, strict=True)]
            if cut and t % cut == 0:
                change = 0 * change
            if clip:
                change = change.clamp(-clip, clip)
            real = torch.ones(2, 1, 1, dtype=torch.bool) if layout is None else layout.valid[:, t, None, None]
            flow = torch.where(real, change, flow)  # padding leaves alone what flows past it
        wanted = dict(zip(("d inputs", "d matrices", "d vectors", "d state"), (*total, flow), strict=True))
        assert_near({k: found[k] for k in wanted}, wanted, 1e-9, "gradients and their definition")
        plain = uncompiled(cell, given, layout, clip or 0.0, cut or 0)
        assert_near({k: plain[k] for k in wanted}, wanted, 1e-9, "uncompiled kernels and the definition")
        fused = kernel(cell, given, layout, gradient_clip=clip, truncate=cut)
        assert_near({k: fused[k] for k in wanted}, wanted, KERNEL_TOLERANCE, "kernels and the definition")


def test_what_nothing_flows_to_has_a_gradient_of_zero():
    """A product and an input that only decide; memory that no kernel writes to is NaN in tests."""
    cell = Cell("h = where(U @ h < W @ x, 0.3, 0.7) * h + V @ x", "h")
    given = arguments(cell, 2, 3, 2, 4)
    for found in (uncompiled(cell, given), results(cell, given)):
        assert not found["d matrices"].any()
        assert not found["d inputs"][:, :, cell.inputs.index("W")].any()
        assert found["d inputs"][:, :, cell.inputs.index("V")].all()


# -- as an operator ----------------------------------------------------------------------------------------------------
def test_the_number_of_threads_makes_no_difference():
    for name, heads, dim in (("gru-after", 4, 48), ("indrnn", 1, 256)):
        cell, given = CELLS[name][0], arguments(CELLS[name][0], 17, 20, heads, dim)
        same_bits(cell, given, None)
        same_bits(cell, given, list(layouts(17, 20))[-1])


def same_bits(cell, given, segments):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(kernel(cell, given, segments))
    for name in ("y", "state", "d inputs", "d state"):  # PyTorch's own sums and products follow
        assert torch.equal(found[0][name], found[1][name]), name
    assert_near(found[1], found[0], 1e-6, "two threads and one")


def test_the_operators_are_sound():
    cell = CELLS["lstm"][0]
    for segments in list(layouts(2, 4))[::3]:
        codes = None if segments is None else segments.codes()
        given = [x.float().requires_grad_() for x in arguments(cell, 2, 4, 2, 4)]
        for keep in (True, False):
            leaves = given if keep else [x.detach() for x in given]
            torch.library.opcheck(numba_cpu._forward_op, (cell.key, *leaves, codes, 0.0, 0, 0, keep))
        y, last, *saved = numba_cpu._forward_op(cell.key, *given, codes, 0.0, 0, 0, True)
        inputs, matrices, vectors, _ = (x.detach() for x in given)
        saved = [x.detach() for x in saved]
        back = (
            cell.key,
            inputs,
            matrices,
            vectors,
            codes,
            0.0,
            0,
            0,
            *saved,
            torch.ones_like(y),
            torch.ones_like(last),
        )
        torch.library.opcheck(numba_cpu._backward_op, [x.detach() if isinstance(x, Tensor) else x for x in back])


@NAMES
def test_without_backward_nothing_is_kept(name):
    """The same bits, in memory for one token."""
    cell = CELLS[name][0]
    for heads, batch in ((2, 9), (1, 2)):
        given = [x.float() for x in arguments(cell, batch, 5, heads, 6)]
        for segments in layouts(batch, 5):
            codes = None if segments is None else segments.codes()
            y, last, *saved = numba_cpu._forward_op(cell.key, *given, codes, 0.0, 0, 0, True)
            again, same, *less = numba_cpu._forward_op(cell.key, *given, codes, 0.0, 0, 0, False)
            assert torch.equal(again, y)
            assert torch.equal(same, last)
            assert [5 * x.numel() for x in less] == [x.numel() for x in saved]
    calls, forward = [], numba_cpu._call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_cpu, "_call", lambda *x: calls.append(x[-1]) or forward(*x))
        leaves = [x.requires_grad_() for x in given]
        with tidegate.backend("numba"):
            cell(*leaves)
            with torch.no_grad():
                cell(*leaves)
            cell(*(x.detach() for x in leaves))
    assert calls == [True, False, False]


def test_one_cell_twice_in_a_graph():
    cell = CELLS["elman"][0]
    given = arguments(cell)

    def twice(inputs, matrices, vectors, state):
        y, last = cell(inputs, matrices, vectors, state)
        return cell(y.unsqueeze(2), 2 * matrices, vectors, last)

    wanted = results(lambda *x: twice_by(loop, x), given)
    assert_near(results(twice, given), wanted, 1e-9, "two layers of one cell")
    assert_near(results(twice, given, torch.float32), wanted, KERNEL_TOLERANCE, "two layers of one cell, kernels")


def twice_by(run, given):
    inputs, matrices, vectors, state = given
    y, last = run(literal("elman"), inputs, matrices, vectors, state)
    return run(literal("elman"), y.unsqueeze(2), 2 * matrices, vectors, last)


def test_copies_and_pickles_are_the_cell():
    cell = Cell("c = f * c + W @ x  # fading\n\n  h = tanh(c)", "c, h")
    assert cell.states == ("c", "h")
    assert repr(cell) == "Cell('c = f * c + W @ x  # fading\\n\\nh = tanh(c)', states='c h')"
    given = arguments(cell)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), eval(repr(cell))):
        assert (twin.equations, twin.states, twin.key) == (cell.equations, cell.states, cell.key)
        assert torch.equal(twin(*given)[0], cell(*given)[0])


def test_a_home_that_cannot_be_written_to_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba_cpu, "cache_folder", lambda: tmp_path / "file" / "below")
    cell = Cell("h = h + 0.25 * x", "h")
    with tidegate.backend("numba"):
        y, _ = cell(torch.ones(1, 3, 1, 1))
    assert y.flatten().tolist() == [0.25, 0.5, 0.75]

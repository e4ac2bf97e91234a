"""ops.selective_scan: three backends against each other, against ops.scan, and against the sum it abbreviates."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.export import Dim
from torch.nn import functional

import tidegate
from tests.ops.test_scan import LENGTHS, layouts
from tidegate import Segments, ops
from tidegate.ops import selective_scan

B, D, N = 3, 5, 3
# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
OPTIONAL = ("d", "dt_bias", "z")


def inputs(T, *, dtype=torch.float64, batch=B, dim=D, states=N, bare=False):
    given = {
        "x": torch.randn(batch, T, dim),
        "dt": torch.randn(batch, T, dim),
        "a": -4 * torch.rand(dim, states),
        "b": torch.randn(batch, T, states),
        "c": torch.randn(batch, T, states),
        "d": torch.randn(dim),
        "dt_bias": torch.randn(dim),
        "z": torch.randn(batch, T, dim),
        "state": torch.randn(batch, dim, states),
    }
    if bare:
        given = {name: x for name, x in given.items() if name not in OPTIONAL}
        given["dt"] = functional.softplus(given["dt"])
    return {name: x.to(dtype) for name, x in given.items()}


def results(backend, given, dtype=None, **options):
    """y, the final state, and the gradients of all arguments, through both."""
    leaves = {name: (x if dtype is None else x.to(dtype)).clone().requires_grad_() for name, x in given.items()}
    with tidegate.backend(backend):
        y, last = selective_scan(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    return [y, last, *torch.autograd.grad(loss, list(leaves.values()))]


def assert_close(seen, wanted, outputs, gradients):
    for position, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        limit = (outputs if position < 2 else gradients) * max(1.0, float(w.detach().abs().max()))
        error = float((s.to(w.dtype) - w).detach().abs().max())
        assert error <= limit, f"result {position}: {error} > {limit}"


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_parallel_and_kernel_equal_reference(T, bare, negative):
    for segments in layouts(T):
        given, options = inputs(T, bare=bare), dict(segments=segments, negative_eigenvalues=negative)
        wanted = results("reference", given, **options)
        assert_close(results("parallel", given, **options), wanted, 1e-9, 1e-9)
        assert_close(results("numba", given, torch.float32, **options), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize(("dim", "states"), [(1, 1), (16, 16), (150, 5), (1100, 2)])
def test_kernel_takes_any_width(dim, states):
    """Parts of a vector, more than one block of channels, an odd number of states."""
    given = inputs(40, batch=2, dim=dim, states=states)
    wanted = results("parallel", given)
    assert_close(results("numba", given, torch.float32), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_is_a_diagonal_scan_of_all_states(backend, negative):
    """Second form: ops.scan over D * N channels, with everything written out."""
    T = 70
    given = inputs(T)
    segments = layouts(T)[-1]
    step = functional.softplus(given["dt"] + given["dt_bias"])
    decay = torch.exp(step[..., None] * given["a"])
    decay = 2 * decay - 1 if negative else decay
    taken = (step * given["x"])[..., None] * given["b"][:, :, None]
    h, last = ops.scan(decay.flatten(2), taken.flatten(2), state=given["state"].flatten(1), segments=segments)
    y = torch.einsum("btdn,btn->btd", h.unflatten(2, (D, N)), given["c"]) + given["d"] * given["x"]
    expected = segments.zero_padding(y * functional.silu(given["z"]))
    narrow = {name: x.float() for name, x in given.items()} if backend == "numba" else given
    with tidegate.backend(backend):
        seen = selective_scan(**narrow, segments=segments, negative_eigenvalues=negative)
    assert_close(seen, [expected, last.unflatten(1, (D, N))], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_is_attention_with_decays(backend):
    """Third form: y_t = sum_s <c_t, exp((S_t - S_s) a) b_s> dt_s x_s, with S the sum of all steps up to a token."""
    T = 33
    given = inputs(T, bare=True)
    total = given["dt"].cumsum(1)
    between = (total[:, :, None] - total[:, None]).clamp(min=0)  # (B, t, s, D)
    decay = torch.exp(between[..., None] * given["a"]) * torch.ones(T, T).tril()[None, :, :, None, None]
    scores = torch.einsum("btn,btsdn,bsn->btsd", given["c"], decay.double(), given["b"])
    y = torch.einsum("btsd,bsd->btd", scores, given["dt"] * given["x"])
    y = y + torch.einsum("btn,btdn,bdn->btd", given["c"], torch.exp(total[..., None] * given["a"]), given["state"])
    narrow = {name: x.float() for name, x in given.items()} if backend == "numba" else given
    with tidegate.backend(backend):
        assert_close([selective_scan(**narrow)[0]], [y], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_padding_is_never_read(backend):
    T, given = 40, inputs(40, dtype=torch.float32)
    real = torch.ones(B, T + 3, dtype=torch.bool)
    real[:, [0, 11, T + 2]] = False
    where = real[0].nonzero()[:, 0]
    wide = dict(given)
    for name in ("x", "dt", "b", "c", "z"):
        wide[name] = torch.full((B, T + 3, given[name].shape[2]), torch.nan)
        wide[name][:, where] = given[name]
        wide[name].requires_grad_()
    with tidegate.backend(backend):
        y, last = selective_scan(**given)
        y_wide, last_wide = selective_scan(**wide, segments=Segments.padded(real))
        # And a cut changes nothing.
        pieces, state = [], given["state"]
        for part in (slice(0, 7), slice(7, T)):
            cut = {name: x[:, part] if x.ndim == 3 and x.shape[1] == T else x for name, x in given.items()}
            piece, state = selective_scan(**{**cut, "state": state})
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y_wide[:, where], y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_wide, last, atol=1e-5, rtol=1e-5)
    assert (y_wide[~real] == 0).all()
    (y_wide.sum() + last_wide.sum()).backward()
    for name in ("x", "dt", "b", "c", "z"):
        assert wide[name].grad.isfinite().all()
        assert (wide[name].grad[~real] == 0).all()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_extreme_steps_are_exact(backend, negative):
    T = 70
    given = inputs(T, bare=True)
    given["dt"] = torch.tensor([0.0, 1e-30, 1e-8, 1.0, 50.0, 1e4])[torch.randint(6, (B, T, D))].double()
    given["a"] = -(10.0 ** torch.randint(-3, 4, (D, N))).double()
    given["x"] = torch.where(given["dt"] > 10, 1e-3, 1.0) * given["x"]
    options = dict(negative_eigenvalues=negative)
    wanted = results("reference", {name: x.float().double() for name, x in given.items()}, **options)
    seen = results(backend, given, torch.float32, **options)
    assert all(x.isfinite().all() for x in seen)
    assert_close(seen, wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)
    # Without a step nothing happens, exactly; after an enormous one nothing of the past is left.
    still = dict(given, dt=torch.zeros_like(given["dt"]))
    with tidegate.backend(backend):
        still = {name: x.float() for name, x in still.items()}
        assert torch.equal(selective_scan(**still, **options)[1], still["state"])
        gone = dict(still, dt=torch.full((B, T, D), 1e8), a=torch.full((D, N), -1e4), b=torch.zeros(B, T, N))
        assert (selective_scan(**gone)[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    given = {name: x.to(dtype) for name, x in inputs(50).items()}
    y, last = selective_scan(**given)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    expected, expected_last = selective_scan(**{name: x.double() for name, x in given.items()})
    assert_close([y, last], [expected, expected_last], torch.finfo(dtype).eps, 0)
    assert all(g.dtype == dtype for g in results("numba", given)[2:])


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.selective_scan.numba_cpu")
    for bare in (False, True):
        for segments in (None, layouts(6)[-1]):
            codes = None if segments is None else segments.codes()
            given = {name: x.requires_grad_() for name, x in inputs(6, dtype=torch.float32, bare=bare).items()}
            first = [given.get(name) for name in ("x", "dt", "a", "b", "c", *OPTIONAL)]
            state = given["state"].detach().transpose(1, 2).contiguous().requires_grad_()
            first[2] = first[2].detach().t().contiguous().requires_grad_()
            torch.library.opcheck(module._forward_op, (*first, state, codes, bare, True))
            first = [None if x is None else x.detach() for x in first]
            y, last, saved = module._forward_op(*first, state.detach(), codes, bare, True)
            torch.library.opcheck(module._backward_op, (*first, codes, bare, saved, y, last))


def test_keeps_nothing_for_a_backward_pass_that_is_not_to_come():
    module = importlib.import_module("tidegate.ops.selective_scan.numba_cpu")
    x, a = torch.empty(2, 33, 5), torch.empty(3, 5)
    assert module._saved_size(x, a, False) == 0
    assert module._saved_size(x, a, True) == 2 * 2 * 15


def test_bitwise_equal_for_any_number_of_threads():
    given = inputs(70, dtype=torch.float32, dim=300, batch=1, states=16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = results("numba", given)
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(results("numba", given), single, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bare", [False, True])
def test_second_derivatives(bare):
    given = inputs(4, batch=1, dim=2, states=2, bare=bare)
    names = list(given)

    def function(*leaves):
        return selective_scan(**dict(zip(names, leaves, strict=True)), segments=Segments.packed([[1, 3]]))

    leaves = [x.requires_grad_() for x in given.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("T", [9, 70])  # 70: chunks of the parallel form are computed again
def test_second_derivatives_of_the_kernel(T):
    given = inputs(T)
    for segments in (None, layouts(T)[-1]):
        found = []
        for backend, cast in (("reference", torch.float64), ("parallel", torch.float64), ("numba", torch.float32)):
            leaves = {name: x.to(cast).clone().requires_grad_() for name, x in given.items()}
            with tidegate.backend(backend):
                y, last = selective_scan(**leaves, segments=segments)
            first = torch.autograd.grad((y * y).sum() + (last**3).sum(), list(leaves.values()), create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, list(leaves.values()))])
        assert_close(found[1], found[0], 1e-9, 1e-9)
        assert_close(found[2], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_the_parallel_form_keeps_no_expanded_tensor_for_backward():
    T, dim, states = 1024, 8, 16
    given = {name: x.requires_grad_() for name, x in inputs(T, batch=1, dim=dim, states=states).items()}
    largest = 0

    def see(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        selective_scan(**given)
    assert largest <= T * states


def test_vmap():
    given = inputs(70, dtype=torch.float32)
    pairs = {name: torch.stack([x, 0.5 * x]) for name, x in given.items()}
    y, last = torch.vmap(lambda given: selective_scan(**given))(pairs)
    for n in range(2):
        expected = selective_scan(**{name: x[n] for name, x in pairs.items()})
        assert_close([y[n], last[n]], expected, OUTPUT_TOLERANCE, 0)


class Scan(torch.nn.Module):
    def forward(self, x, dt, a, b, c, d, dt_bias, z, state, segments=None):
        return selective_scan(x, dt, a, b, c, d=d, dt_bias=dt_bias, z=z, state=state, segments=segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_to_one_graph(dtype):
    arguments = [x.requires_grad_() for x in inputs(70, dtype=dtype).values()]
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
    for segments in (None, layouts(70)[-1]):
        found = []
        for module in (compiled, Scan()):
            y, last = module(*arguments, segments)
            found.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), arguments)])
        assert_close(found[0], found[1], 1e-6, 1e-5)


def test_exports_with_any_length():
    T = Dim("T", min=1)
    for with_segments in (False, True):
        example = inputs(6, dtype=torch.float32)
        shapes = [{1: T} if x.ndim == 3 and name != "state" else {} for name, x in example.items()]
        segments = layouts(6)[-1] if with_segments else None
        shapes.append([{1: T}, {1: T}] if with_segments else None)
        arguments = (*example.values(), segments)
        program = torch.export.export(Scan(), arguments, dynamic_shapes=tuple(shapes)).module()
        for length in (1, 2, 17):
            given = inputs(length, dtype=torch.float32)
            segments = layouts(length)[-1] if with_segments else None
            wanted = selective_scan(**given, segments=segments)
            assert_close(program(*given.values(), segments), wanted, OUTPUT_TOLERANCE, 0)


def test_errors_name_the_argument():
    given = inputs(4)
    for match, changed in (
        (r"x: seen shape \(3, 5\)", {"x": given["x"][:, 0]}),
        (r"x: seen T = 0", {"x": given["x"][:, :0]}),
        (r"a: seen shape \(4, 3\), wanted \(dim=5, states\)", {"a": given["a"][:4]}),
        (r"dt: seen shape \(3, 4, 4\), wanted \(3, 4, 5\)", {"dt": given["dt"][..., :4]}),
        (r"b: seen shape \(3, 4, 2\), wanted \(3, 4, 3\)", {"b": given["b"][..., :2]}),
        (r"dt_bias: seen shape \(1,\)", {"dt_bias": given["dt_bias"][:1]}),
        (r"state: seen shape \(3, 3, 5\)", {"state": given["state"].transpose(1, 2)}),
        (r"z: seen dtype torch.int64", {"z": given["z"].long()}),
        (r"segments: made for \(batch, time\) = \(3, 6\)", {"segments": layouts(6)[1]}),
    ):
        with pytest.raises(ValueError, match=match):
            selective_scan(**{**given, **changed})


def test_an_empty_batch_is_an_empty_answer():
    y, state = selective_scan(**inputs(4, dtype=torch.float32, batch=0))
    assert y.shape == (0, 4, D)
    assert state.shape == (0, D, N)

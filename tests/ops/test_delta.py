"""dplr and delta_rule: three implementations of one equation, and the transition matrices written out."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

import tidegate
from tidegate import Segments
from tidegate.ops import delta_rule, dplr

B, H, K, V = 2, 2, 6, 5
LENGTHS = (1, 2, 17, 64, 65, 131)
DECAYS = ("none", "head", "token", "key")
FORMS = ("delta", "two steps", "tied", "dplr")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make_inputs(form, time, decay="token", extreme=False, sizes=(B, H, K, V)):
    """Leaves for `call`, in its order; unit keys, so that transitions do not expand."""
    B, H, K, V = sizes
    shape = {"none": None, "head": (H,), "token": (B, time, H), "key": (B, time, H, K)}[decay]
    g = None if shape is None else -normal(*shape).abs() / 2
    if extreme:
        g = torch.where(torch.rand_like(g) < 0.3, torch.where(torch.rand_like(g) < 0.5, -200.0, -1e4), 0 * g)
    steps = (2,) if form == "two steps" else ()
    q, v = normal(B, time, H, K), normal(B, time, *steps, H, V)
    k = normalize(normal(B, time, *steps, H, K), dim=-1)
    if form in ("delta", "two steps"):
        a, b = 2 * torch.rand(B, time, *steps, H, dtype=torch.float64), None  # a is beta
    else:
        removed = normalize(normal(B, time, H, K), dim=-1)
        a, b = (-k * 0.9, None) if form == "tied" else (-removed, removed * torch.rand(B, time, H, K).double())
    inputs = [q, k, v, a, b, g, normal(B, H, K, V)]
    # Values that float32 has too, so that precisions can be compared.
    return [None if x is None else x.detach().float().double().requires_grad_() for x in inputs]


def call(form, inputs, segments=None):
    q, k, v, a, b, g, state = inputs
    if form in ("delta", "two steps"):
        return delta_rule(q, k, v, a, g, scale=0.5, state=state, segments=segments)
    return dplr(q, k, v, a, b, g, scale=0.5, state=state, segments=segments)


def make_segments(time):
    """None, padding on the left, on the right and in holes, packed documents, both, and both continuing."""
    yield None
    left, right = torch.ones(B, time), torch.ones(B, time)
    left[0, : time // 2], right[1, time - time // 3 :] = 0, 0
    holes = torch.rand(B, time) > 0.3
    yield Segments.padded(left)
    yield Segments.padded(right)
    yield Segments.padded(holes)
    if time > 2:
        lengths = [[1, time - 1], [time // 2, time - time // 2]]
        yield Segments.packed(lengths)
        yield Segments.packed(lengths, continues=True) & Segments.padded(holes)


def run(backend, form, inputs, segments=None):
    """Output, final state, and the gradients of everything through both."""
    with tidegate.backend(backend):
        o, last = call(form, inputs, segments)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, last)]
    wanted = [x for x in inputs if x is not None]
    return [o, last, *torch.autograd.grad((o * weights[0]).sum() + (last * weights[1]).sum(), wanted)]


def assert_close(actual, expected, tolerance):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.isfinite(a).all()
        scale = max(float(e.detach().abs().max()), 1e-3)
        error = float((a.double() - e.double()).detach().abs().max()) / scale
        assert error <= tolerance * (1 if index < 2 else 5), f"result {index}: relative error {error:.1e}"


def single(inputs):
    return [None if x is None else x.detach().float().requires_grad_() for x in inputs]


@pytest.mark.parametrize("extreme", [False, True], ids=["mild", "extreme"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_implementations_agree(form, decay, extreme):
    if extreme and decay in ("none", "head"):
        extreme = False  # a constant extreme decay leaves gradients of 1e-80 to compare
    for index, time in enumerate(LENGTHS):
        for kind, segments in enumerate(make_segments(time)):
            if kind % 3 != index % 3:
                continue  # every kind meets short and long sequences
            inputs = make_inputs(form, time, decay, extreme)
            expected = run("reference", form, inputs, segments)
            assert_close(run("parallel", form, inputs, segments), expected, 1e-9)
            assert_close(run("numba", form, single(inputs), segments), expected, 2e-5)


def test_other_widths():
    """Widths that are and are not multiples of a vector, K above and below V."""
    for widths in ((1, 1), (16, 33), (40, 16), (64, 64)):
        for form in FORMS:
            inputs = make_inputs(form, 37, "key", sizes=(1, 2, *widths))
            assert_close(run("numba", form, single(inputs)), run("reference", form, inputs), 2e-5)


# -- the closed form ---------------------------------------------------------------------------------------------------
def transitions(form, inputs):
    """A_t and the written B_t with S_t = A_t S_{t-1} + B_t, as full matrices (B, T, H, K, K or V)."""
    _, k, v, a, b, g, _ = inputs
    eye = torch.eye(K, dtype=torch.float64)
    w = torch.ones(B, k.shape[1], H, K, dtype=torch.float64)
    if g is not None:
        w = w * (g if g.ndim == 4 else g.unsqueeze(-1)).exp()
    if form in ("tied", "dplr"):
        b = k if b is None else b
        return torch.diag_embed(w) + b[..., None] * a[..., None, :], k[..., None] * v[..., None, :]
    if form == "delta":
        k, v, a = k.unsqueeze(2), v.unsqueeze(2), a.unsqueeze(2)
    A, written = torch.diag_embed(w), 0
    for n in range(k.shape[2]):
        key, beta = k[:, :, n, ..., None], a[:, :, n, ..., None, None]
        reflection = eye - beta * key @ key.mT
        A, written = reflection @ A, reflection @ written if n else 0
        written = written + beta * key * v[:, :, n, ..., None, :]
    return A, written


@pytest.mark.parametrize("decay", ["none", "token", "key"])
@pytest.mark.parametrize("form", FORMS)
def test_closed_form(form, decay):
    """S_T = A_T ... A_1 S_0 + sum_t A_T ... A_{t+1} B_t."""
    inputs = make_inputs(form, 23, decay)
    A, written = transitions(form, inputs)
    product, S = torch.eye(K, dtype=torch.float64).expand(B, H, K, K), 0
    outputs = []
    for t in range(23):
        product = A[:, t] @ product
        tail = torch.eye(K, dtype=torch.float64)
        S = product @ inputs[-1]
        for s in range(t, -1, -1):
            S = S + tail @ written[:, s]
            tail = tail @ A[:, s]
        outputs.append(0.5 * (inputs[0][:, t, ..., None, :] @ S).squeeze(-2))
    for backend in ("reference", "parallel"):
        with tidegate.backend(backend):
            o, last = call(form, inputs)
        assert_close([o, last], [torch.stack(outputs, 1), S], 1e-10)


def test_transitions_never_expand():
    for form in ("delta", "two steps"):
        A, _ = transitions(form, make_inputs(form, 50))
        assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12


def test_two_steps_are_two_single_steps():
    q, k, v, beta, _, g, state = make_inputs("two steps", 19)
    o, last = call("two steps", [q, k, v, beta, None, g, state])
    # The first step of a token decays and is not read, the second does not decay and is.
    outputs = []
    for t in range(19):
        now = slice(t, t + 1)
        _, state = delta_rule(q[:, now], k[:, now, 0], v[:, now, 0], beta[:, now, 0], g[:, now], state=state)
        out, state = delta_rule(q[:, now], k[:, now, 1], v[:, now, 1], beta[:, now, 1], scale=0.5, state=state)
        outputs.append(out)
    assert_close([o, last], [torch.cat(outputs, 1), state], 1e-12)


def test_orthonormal_keys_recall_exactly():
    keys, values = torch.eye(K)[None, :, None], torch.randn(1, K, 1, V)
    _, state = delta_rule(keys, keys, values, torch.ones(1, K, 1), torch.zeros(1, K, 1))
    torch.testing.assert_close(state[0, 0], values[0, :, 0], rtol=0, atol=1e-7)
    replaced, _ = delta_rule(keys, keys, -values, torch.ones(1, K, 1), state=state)  # overwritten, not added to
    torch.testing.assert_close(replaced[0, :, 0], -values[0, :, 0], rtol=0, atol=1e-6)


def test_two_reflections_rotate():
    angle = 0.3
    keys = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()
    k = keys[None, None, :, None].expand(1, 1, 2, 1, 2)
    _, state = delta_rule(
        k[:, :, 0],
        k,
        torch.zeros_like(k),
        torch.full((1, 1, 2, 1), 2.0).double(),
        state=torch.eye(2)[None, None].double(),
    )
    rotation = [[math.cos(2 * angle), -math.sin(2 * angle)], [math.sin(2 * angle), math.cos(2 * angle)]]
    torch.testing.assert_close(state[0, 0], torch.tensor(rotation).double())


# -- contracts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_invisible(form, backend):
    """NaN on padding reaches nothing, and receives zeros."""
    inputs = single(make_inputs(form, 20))
    mask = torch.rand(B, 20) > 0.4
    poisoned = [x.detach().clone().requires_grad_() if x is not None else None for x in inputs]
    for x in poisoned[:-1]:
        if x is not None:
            x.data[~mask] = float("nan")
    results = run(backend, form, poisoned, Segments.padded(mask))
    assert_close(results, run(backend, form, inputs, Segments.padded(mask)), 1e-6)
    assert not results[0][~mask].any()
    for gradient in results[2:-1]:
        assert not gradient[~mask].any()


def test_half_precision_computes_in_single():
    inputs = make_inputs("dplr", 40, "key")
    half = [x.detach().bfloat16() for x in inputs[:-1]] + [inputs[-1].detach().float()]
    for backend in ("reference", "parallel", "numba"):
        with tidegate.backend(backend):
            o, last = call("dplr", half)
            exact, exact_last = call("dplr", [x.float() for x in half])
        assert o.dtype == torch.bfloat16
        assert last.dtype == torch.float32
        assert_close([o, last], [exact.bfloat16(), exact_last], 1e-2)


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    try:
        # One pair is broken up into columns; three share two threads unevenly.
        for form, sizes in itertools.product(FORMS, [(2, 3, 32, 32), (1, 1, 20, 56), (1, 3, 32, 40)]):
            inputs, results = single(make_inputs(form, 300, "key", sizes=sizes)), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run("numba", form, inputs))
            assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(form, packed):
    from tidegate.ops.delta.numba_cpu import backward_op, forward_op

    q, k, v, a, b, g, state = single(make_inputs("delta" if form == "two steps" else form, 9))
    g = g.unsqueeze(-1).detach().requires_grad_()
    codes = Segments.packed([[4, 5], [3, 2]]).codes() if packed else None
    a, beta = (None, a) if form in ("delta", "two steps") else (a, None)
    arguments = (q, k, v, a, b, beta, None if form == "two steps" else g, state, codes)
    torch.library.opcheck(forward_op, (*arguments, 0.5))
    arguments = [x.detach() if x is not None else None for x in arguments]
    torch.library.opcheck(backward_op, (*arguments, 0.5, torch.randn(B, 9, H, V), torch.randn(B, H, K, V)))


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form):
    inputs = make_inputs(form, 3, "key", sizes=(1, 1, 2, 2))
    wanted = [x for x in inputs if x is not None]

    def function(*leaves):
        given = iter(leaves)
        return call(form, [None if x is None else next(given) for x in inputs])

    with tidegate.backend("parallel"):
        assert torch.autograd.gradcheck(function, wanted)
        assert torch.autograd.gradgradcheck(function, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_kernel_gives_second_derivatives(form):
    """Through the kernel's own autograd formula, against the parallel form."""
    results = []
    for backend in ("numba", "parallel"):
        torch.manual_seed(0)
        inputs = single(make_inputs(form, 18))
        with tidegate.backend(backend):
            o, last = call(form, inputs, Segments.packed([[10, 8], [18]]))
            wanted = [x for x in inputs if x is not None]
            first = torch.autograd.grad(o.sin().sum() + last.square().sum(), wanted, create_graph=True)
            results.append(torch.autograd.grad(sum(x.square().sum() for x in first), wanted))
    assert_close(results[0], results[1], 1e-4)


def test_vmap():
    inputs = [x.detach() for x in make_inputs("dplr", 20, "key")]
    stacked = [torch.stack([x, x / 2, x / 3]) for x in inputs]
    o, last = torch.vmap(lambda *xs: call("dplr", xs))(*stacked)
    for index in range(3):
        assert_close([o[index], last[index]], call("dplr", [x[index] for x in stacked]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_compile(form):
    inputs = single(make_inputs(form, 20))
    segments = Segments.packed([[10, 10], [15]])

    def function(*xs):
        return call(form, xs, segments)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, actual = function(*inputs), compiled(*inputs)
    assert_close(actual, expected, 1e-6)
    wanted = [x for x in inputs if x is not None]
    assert_close(
        torch.autograd.grad(actual[0].sum(), wanted, allow_unused=True),
        torch.autograd.grad(expected[0].sum(), wanted, allow_unused=True),
        1e-6,
    )


@pytest.mark.parametrize("form", FORMS)
def test_export_with_dynamic_time(form):
    class Module(torch.nn.Module):
        def forward(self, *xs):
            return call(form, [*xs[:4], None if form != "dplr" else xs[4], *xs[-2:]])

    def given(time):
        return tuple(x.detach() for x in make_inputs(form, time) if x is not None)

    time = torch.export.Dim("time", min=1)
    arguments = given(7)
    dynamic = ((*({1: time} for _ in arguments[:-1]), {}),)
    program = torch.export.export(Module(), arguments, dynamic_shapes=dynamic)
    for length in (1, 2, 30):
        arguments = given(length)
        assert_close(program.module()(*arguments), Module()(*arguments), 1e-9)


def test_wrong_inputs_are_explained():
    q, k, v, beta, _, g, state = make_inputs("delta", 5)
    with pytest.raises(ValueError, match=r"k: seen shape \(2, 5, 2, 5\)"):
        delta_rule(q, k[..., 1:], v, beta)
    with pytest.raises(ValueError, match="v: seen shape"):
        delta_rule(q, k, v[:, 1:], beta)
    with pytest.raises(ValueError, match="beta: seen shape"):
        delta_rule(q, k, v, beta[..., None])
    with pytest.raises(ValueError, match="log_decay: seen shape"):
        delta_rule(q, k, v, beta, g[:, :, :1])
    with pytest.raises(ValueError, match="state: seen shape"):
        delta_rule(q, k, v, beta, state=state[:1])
    with pytest.raises(ValueError, match="segments: made for"):
        delta_rule(q, k, v, beta, segments=Segments.packed([[4], [4]]))
    with pytest.raises(ValueError, match="at least one token"):
        delta_rule(q[:, :0], k[:, :0], v[:, :0], beta[:, :0])
    with pytest.raises(ValueError, match="b: seen shape"):
        dplr(q, k, v, k, k[..., 1:])
    q, k, v, beta, *_ = make_inputs("two steps", 5)
    with pytest.raises(ValueError, match=r"beta: seen shape .* wanted \(B, T, n, H\)"):
        delta_rule(q, k, v, beta[:, :, 0])
    with pytest.raises(ValueError, match="v: seen shape"):
        delta_rule(q, k, v[:, :, 0], beta)
    with pytest.raises(ValueError, match="q: seen shape"):
        delta_rule(q[:, 1:], k, v, beta)

"""ops.pointwise and ops.rg_lru: the kernels against plain PyTorch in float64, and that against the equations."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import tidegate
from tidegate.ops import pointwise
from tidegate.ops.rg_lru import rg_lru_gates

# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
NAMES = ("swiglu", "elu_plus_one", "log_sigmoid", "rotate", "token_mix", "rg_lru_gates")


def op(name: str):
    return rg_lru_gates if name == "rg_lru_gates" else getattr(pointwise, name)


def inputs(name: str, T: int = 9, dtype=torch.float64, extreme: bool = False) -> list[Tensor]:
    """Differentiable ones first."""
    normal = partial(torch.randn, dtype=dtype)
    if name == "swiglu":
        return [normal(2, T, 42) * (30 if extreme else 1)]
    if name == "elu_plus_one":
        return [normal(2, T, 3, 12) * (30 if extreme else 1)]
    if name == "log_sigmoid":
        return [normal(2, T, 36) * (30 if extreme else 1), normal(36)]
    if name == "rotate":
        angle = normal(1, T, 6)
        return [normal(2, T, 3, 12), angle.cos(), angle.sin()]
    if name == "token_mix":
        return [normal(2, T, 37), normal(2, T, 37), torch.rand(6, 37, dtype=dtype)]
    gates, rate = normal(2, T, 3, 14), torch.rand(21, dtype=dtype)
    if extreme:  # decays of e^-200 and of 1 - 1e-8, at once
        gates, rate = gates * 20, rate * 200
    return [normal(2, T, 21), gates, rate, torch.arange(T).expand(2, T) == 0]


def differentiable(name: str, arguments: list[Tensor]) -> list[Tensor]:
    return arguments[:1] if name == "rotate" else [x for x in arguments if x.is_floating_point()]


def results(name: str, backend: str, arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients."""
    given = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    leaves = [x.detach().clone().requires_grad_() for x in differentiable(name, given)]
    given = [*leaves, *given[len(leaves) :]]
    with tidegate.backend(backend):
        y = op(name)(*given)
        y = [y] if isinstance(y, Tensor) else list(y)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in y]
        return [*y, *torch.autograd.grad(y, leaves, upstream)]


def assert_close(seen: list[Tensor], wanted: list[Tensor], outputs: int) -> None:
    for number, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        limit = (OUTPUT_TOLERANCE if number < outputs else GRADIENT_TOLERANCE) * max(1.0, float(w.detach().abs().max()))
        assert float((s.detach().double() - w.detach()).abs().max()) <= limit, f"result {number}"


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_plain_pytorch(name, extreme):
    for T in (1, 2, 65):
        arguments = [x.float().double() if x.is_floating_point() else x for x in inputs(name, T, extreme=extreme)]
        wanted = results(name, "parallel", arguments, torch.float64)
        seen = results(name, "numba", arguments, torch.float32)
        assert all(z.isfinite().all() for z in seen)
        assert_close(seen, wanted, len(wanted) - len(differentiable(name, arguments)))


def test_swiglu_and_rotation_by_their_equations():
    (x,) = inputs("swiglu")
    torch.testing.assert_close(pointwise.swiglu(x), x[..., :21] * torch.sigmoid(x[..., :21]) * x[..., 21:])
    x, cos, sin = inputs("rotate")
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)[:, :, None]
    torch.testing.assert_close(pointwise.rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


def test_rg_lru_gates_where_the_decay_is_nearly_one():
    """sqrt(1 - a^2) in float32 against float64, where a itself rounds to one."""
    rate = torch.logspace(-12, 2, 200)
    u, gates, first = torch.ones(1, 1, 200), torch.full((1, 1, 1, 400), 3.0), torch.zeros(1, 1, dtype=torch.bool)
    with tidegate.backend("numba"):
        _, b = rg_lru_gates(u, gates, rate, first)
    _, wanted = rg_lru_gates(u.double(), gates.double(), rate.double(), first)
    torch.testing.assert_close(b.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_half_precision_inputs(name):
    arguments = inputs(name, 5, torch.float32)
    wide = torch.cat([arguments[0], arguments[0]], -1)
    slices = [wide[..., : arguments[0].shape[-1]], *arguments[1:]]
    with tidegate.backend("numba"):
        for got, wanted in zip(
            torch.utils._pytree.tree_leaves(op(name)(*slices)),
            torch.utils._pytree.tree_leaves(op(name)(*arguments)),
            strict=True,
        ):
            assert torch.equal(got, wanted)
        half = [
            x.bfloat16() if x.is_floating_point() and x.ndim > (3 if name == "rotate" else 2) else x for x in arguments
        ]
        first = torch.utils._pytree.tree_leaves(op(name)(*half))[0]
        assert first.dtype == (torch.float32 if name in ("rg_lru_gates", "log_sigmoid") else torch.bfloat16)
        assert first.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_opcheck(name):
    folder = "rg_lru" if name == "rg_lru_gates" else "pointwise"
    module = importlib.import_module(f"tidegate.ops.{folder}.numba_cpu")
    arguments = inputs(name, 4, torch.float32)
    for x in differentiable(name, arguments):
        x.requires_grad_()
    scale = (0.5,) if name == "log_sigmoid" else ()
    torch.library.opcheck(getattr(module, name), (*arguments, *scale))
    if name != "rotate":
        plain = [x.detach() for x in arguments]
        with torch.no_grad():
            y = getattr(module, name)(*plain, *scale)
        plain = [y] if name == "elu_plus_one" else plain
        upstream = [y] if isinstance(y, Tensor) else [y] if name == "token_mix" else list(y)
        torch.library.opcheck(getattr(module, name + "_backward"), (*plain, *scale, *upstream))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    arguments = inputs(name, 3)
    found = []
    for backend, dtype in (("parallel", torch.float64), ("numba", torch.float32)):
        given = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
        leaves = [x.clone().requires_grad_() for x in differentiable(name, given)]
        with tidegate.backend(backend):
            y = torch.utils._pytree.tree_leaves(op(name)(*leaves, *given[len(leaves) :]))
            first = torch.autograd.grad(sum((z**3).sum() for z in y), leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert_close(found[1], found[0], 0)


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_equal_for_any_number_of_threads(name):
    before = torch.get_num_threads()
    arguments = inputs(name, 700, torch.float32)
    try:
        torch.set_num_threads(1)
        single = results(name, "numba", arguments, torch.float32)
        torch.set_num_threads(2)
        assert all(map(torch.equal, results(name, "numba", arguments, torch.float32), single))
    finally:
        torch.set_num_threads(before)


class Op(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *arguments: Tensor):
        return op(self.name)(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_exports_and_vmaps(name):
    arguments = inputs(name, 7, torch.float32)
    expected = torch.utils._pytree.tree_leaves(Op(name)(*arguments))
    compiled = torch.compile(Op(name), fullgraph=True, backend="aot_eager")
    T = Dim("T", min=1)
    dynamic = tuple({1: T} if x.ndim > 1 and x.shape[1] == 7 else {} for x in arguments)
    exported = torch.export.export(Op(name), tuple(arguments), dynamic_shapes=(dynamic,)).module()
    for function in (compiled, exported):
        for got, wanted in zip(torch.utils._pytree.tree_leaves(function(*arguments)), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    mapped = torch.vmap(lambda x: Op(name)(x, *arguments[1:]))(torch.stack([arguments[0]] * 2))
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(mapped)[0][1], expected[0], atol=1e-5, rtol=1e-5)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3, 4, 6)
    for match, function, arguments in (
        (r"x: seen shape \(3,\)", "swiglu", (torch.zeros(3),)),
        (r"x: seen shape \(2, 3, 4, 5\)", "rotate", (x[..., :5], x[..., 0, :3], x[..., 0, :3])),
        (r"sin: seen shape \(2, 3, 2\)", "rotate", (x, x[..., 0, :3], x[..., 0, :2])),
        (r"x, shifted, mix: seen shapes", "token_mix", (x[0], x[0, :2], x[0, 0])),
        (r"gates: seen shape \(2, 3, 4, 6\)", "rg_lru_gates", (x[:, :, 0], x, x[0, 0, 0], x[..., 0, 0] > 0)),
        (r"rate, first: seen shapes", "rg_lru_gates", (x.flatten(2), x.repeat(1, 1, 1, 2), x[0, 0, 0], x[..., 0, 0])),
    ):
        with pytest.raises(ValueError, match=match):
            op(function)(*arguments)

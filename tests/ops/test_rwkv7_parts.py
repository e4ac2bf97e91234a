"""ops.rwkv7: the kernels against plain PyTorch in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.export import Dim

import tidegate
from tidegate.ops import rwkv7

# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
NAMES = ("rwkv7_keys", "rwkv7_output")


def inputs(name, T=9, dtype=torch.float64, heads=3, dim=20):
    tokens, parameters = (2, 2) if name == "rwkv7_keys" else (5, 3)
    return [*torch.randn(tokens, 2, T, heads, dim, dtype=dtype), *torch.randn(parameters, heads, dim, dtype=dtype)]


def results(name, backend, arguments, dtype, **options):
    leaves = [x.to(dtype).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        y = getattr(rwkv7, name)(*leaves, **options)
    y = [y] if name == "rwkv7_output" else list(y)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in y]
    return len(y), [*y, *torch.autograd.grad(y, leaves, upstream)]


def assert_close(seen, wanted, outputs):
    for number, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        limit = (OUTPUT_TOLERANCE if number < outputs else GRADIENT_TOLERANCE) * max(1.0, float(w.detach().abs().max()))
        assert float((s.detach().double() - w.detach()).abs().max()) <= limit, f"result {number}"


@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_plain_pytorch(name):
    for T in (1, 2, 65):
        for options in ({}, {"rate": 2.0})[: 2 if name == "rwkv7_keys" else 1]:
            arguments = inputs(name, T)
            outputs, wanted = results(name, "parallel", arguments, torch.float64, **options)
            assert_close(results(name, "numba", arguments, torch.float32, **options)[1], wanted, outputs)


@pytest.mark.parametrize("name", NAMES)
def test_zero_tokens_stay_finite(name):
    """Padding: all that a token brings is zero."""
    arguments = [x * (torch.arange(9) % 2)[:, None, None] if x.ndim > 2 else x for x in inputs(name)]
    assert all(x.isfinite().all() for x in results(name, "numba", arguments, torch.float32)[1])


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_opcheck(name):
    module = importlib.import_module("tidegate.ops.rwkv7.numba_cpu")
    part = name.removeprefix("rwkv7_")
    plain = inputs(name, 4, torch.float32)
    options = (2.0,) if part == "keys" else ()
    torch.library.opcheck(getattr(module, f"_{part}_op"), (*(x.clone().requires_grad_() for x in plain), *options))
    upstream = plain[:1] * (3 if part == "keys" else 1)
    torch.library.opcheck(getattr(module, f"_{part}_backward_op"), (*plain, *options, *upstream))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    arguments, found = inputs(name, 3), []
    for backend, dtype in (("parallel", torch.float64), ("numba", torch.float32)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in arguments]
        with tidegate.backend(backend):
            y = torch.utils._pytree.tree_leaves(getattr(rwkv7, name)(*leaves))
            first = torch.autograd.grad(sum((z**3).sum() for z in y), leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert_close(found[1], found[0], 0)


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_equal_for_any_number_of_threads(name):
    before, arguments = torch.get_num_threads(), inputs(name, 700)
    try:
        torch.set_num_threads(1)
        single = results(name, "numba", arguments, torch.float32)[1]
        torch.set_num_threads(2)
        assert all(map(torch.equal, results(name, "numba", arguments, torch.float32)[1], single))
    finally:
        torch.set_num_threads(before)


class Op(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, *arguments):
        return getattr(rwkv7, self.name)(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_exports_and_vmaps(name):
    arguments = inputs(name, 70, torch.float32)  # enough for the kernel to be worthwhile
    expected = torch.utils._pytree.tree_leaves(Op(name)(*arguments))
    T = Dim("T", min=1)
    dynamic = tuple({1: T} if x.ndim == 4 else {} for x in arguments)
    exported = torch.export.export(Op(name), tuple(arguments), dynamic_shapes=(dynamic,)).module()
    for function in (torch.compile(Op(name), fullgraph=True, backend="aot_eager"), exported):
        for got, wanted in zip(torch.utils._pytree.tree_leaves(function(*arguments)), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    mapped = torch.vmap(lambda x: Op(name)(x, *arguments[1:]))(torch.stack([arguments[0]] * 2))
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(mapped)[0][1], expected[0], atol=1e-4, rtol=1e-4)


def test_errors_name_the_argument():
    x, p = torch.zeros(1, 2, 3, 4), torch.zeros(3, 4)
    for match, name, arguments in (
        (r"first argument: seen shape \(2, 3, 4\)", "rwkv7_keys", (x[0], x, p, p)),
        (r"logits: seen shape \(1, 1, 3, 4\)", "rwkv7_keys", (x, x[:, :1], p, p)),
        (r"k_a: seen shape \(4,\)", "rwkv7_keys", (x, x, p, p[0])),
        (r"gate: seen shape \(1, 1, 3, 4\)", "rwkv7_output", (x, x, x, x, x[:, :1], p, p, p)),
        (r"bias: seen shape \(4,\)", "rwkv7_output", (x, x, x, x, x, p, p, p[0])),
    ):
        with pytest.raises(ValueError, match=match):
            getattr(rwkv7, name)(*arguments)

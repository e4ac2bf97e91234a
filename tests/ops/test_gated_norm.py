"""ops.gated_norm: the kernels against plain PyTorch in float64, and that against torch.nn.RMSNorm."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.export import Dim
from torch.nn import functional

import tidegate
from tidegate.ops import gated_norm

# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
OPTIONS = (
    {},
    {"activation": "sigmoid"},
    {"norm_before_gate": False},
    {"norm_before_gate": False, "activation": "sigmoid"},
)


def inputs(*shape, weight="channel", gate=True, dtype=torch.float64):
    x, given = torch.randn(2, *shape, dtype=dtype)
    own = {"channel": shape[-1:], "head": shape[-2:]}
    return [x, given if gate else None, torch.randn(own[weight], dtype=dtype) if weight else None]


def results(backend, arguments, dtype, **options):
    """y and the gradients of what there is of x, gate and weight."""
    leaves = [None if x is None else x.to(dtype).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        y = gated_norm(*leaves, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], upstream)]


def assert_close(seen, wanted, outputs=1):
    for number, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        limit = (OUTPUT_TOLERANCE if number < outputs else GRADIENT_TOLERANCE) * max(1.0, float(w.detach().abs().max()))
        assert float((s.detach().double() - w.detach()).abs().max()) <= limit, f"result {number}"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weight", ["channel", "head", None])
@pytest.mark.parametrize("gate", [True, False])
def test_kernel_equals_plain_pytorch(gate, weight, options):
    for shape in ((1, 1, 2, 3), (2, 67, 3, 20), (1, 5, 1, 300)):
        arguments = inputs(*shape, weight=weight, gate=gate)
        wanted = results("parallel", arguments, torch.float64, **options)
        assert_close(results("numba", arguments, torch.float32, **options), wanted)


def test_any_number_of_leading_axes():
    for shape in ((7,), (3, 7), (2, 3, 7), (2, 3, 4, 7), (2, 3, 2, 2, 7)):
        arguments = inputs(*shape)
        assert_close(results("numba", arguments, torch.float32), results("parallel", arguments, torch.float64))


def test_equals_torch_rms_norm():
    x, gate, weight = inputs(2, 9, 4, 16)
    norm = torch.nn.RMSNorm(16, eps=1e-3, dtype=torch.float64)
    norm.weight.data = weight
    torch.testing.assert_close(gated_norm(x, weight=weight, eps=1e-3), norm(x))
    torch.testing.assert_close(gated_norm(x, gate, weight, eps=1e-3), norm(x) * functional.silu(gate))
    first = gated_norm(x, gate, weight, eps=1e-3, norm_before_gate=False)
    torch.testing.assert_close(first, norm(x * functional.silu(gate)))


def test_large_small_and_zero_rows_stay_finite():
    x = torch.tensor([0.0, 1e-20, 1e15, 1e30])[:, None, None] * torch.randn(4, 4, 16)
    gate = torch.tensor([-1e4, 0.0, 1e4, 1e4])[:, None, None].expand(4, 4, 16)
    for options in OPTIONS:
        arguments = [x, gate if options.get("norm_before_gate", True) else gate / 1e4, torch.ones(16)]
        seen = results("numba", arguments, torch.float32, eps=1e-6, **options)
        assert all(z.isfinite().all() for z in seen)
        assert_close(seen[:1], results("parallel", arguments, torch.float64, eps=1e-6, **options)[:1])


def test_slices_are_read_where_they_stand():
    wide = torch.randn(2, 33, 60)
    weight = torch.randn(10)
    x, gate = (part.unflatten(-1, (2, 10)) for part in wide[..., 5:45].split(20, -1))
    with tidegate.backend("numba"):
        assert torch.equal(gated_norm(x, gate, weight), gated_norm(x.contiguous(), gate.contiguous(), weight))
        across = x.transpose(1, 2)  # no row of a wider matrix: copied
        assert torch.equal(gated_norm(across, weight=weight), gated_norm(across.contiguous(), weight=weight))


def test_half_precision_keeps_its_dtype():
    arguments = inputs(2, 65, 4, 32, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        y = gated_norm(*(x.to(dtype) for x in arguments))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), gated_norm(*arguments), atol=0.1, rtol=0.02)


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.gated_norm.numba_cpu")
    for gate, weight, first in ((True, "channel", True), (False, "head", True), (True, None, False)):
        arguments = inputs(2, 5, 2, 6, weight=weight, gate=gate, dtype=torch.float32)
        options = (1e-5, "silu", first)
        plain = [None if x is None else x.clone() for x in arguments]
        for x in arguments:
            if x is not None:
                x.requires_grad_()
        torch.library.opcheck(module.forward_op, (*arguments, *options))
        torch.library.opcheck(module.backward_op, (*plain, *options, plain[0]))


def test_bitwise_equal_for_any_number_of_threads():
    before = torch.get_num_threads()
    arguments = inputs(1, 700, 4, 32, dtype=torch.float32)
    try:
        torch.set_num_threads(1)
        single = results("numba", arguments, torch.float32)
        torch.set_num_threads(2)
        assert all(map(torch.equal, results("numba", arguments, torch.float32), single))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_second_derivatives(options):
    arguments = [x.requires_grad_() for x in inputs(1, 3, 2, 4)]
    assert torch.autograd.gradgradcheck(lambda *x: gated_norm(*x, **options), arguments)
    found = []
    for backend, dtype in (("parallel", torch.float64), ("numba", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
        with tidegate.backend(backend):
            first = torch.autograd.grad((gated_norm(*leaves, **options) ** 3).sum(), leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert_close(found[1], found[0], 0)


class Norm(torch.nn.Module):
    def forward(self, x, gate, weight):
        return gated_norm(x, gate, weight)


def test_compiles_exports_and_vmaps():
    arguments = inputs(2, 97, 4, 32, dtype=torch.float32)  # enough for the kernel to be worthwhile
    expected = Norm()(*arguments)
    T = Dim("T", min=1)
    exported = torch.export.export(Norm(), tuple(arguments), dynamic_shapes=({1: T}, {1: T}, {})).module()
    for function in (torch.compile(Norm(), fullgraph=True, backend="aot_eager"), exported):
        torch.testing.assert_close(function(*arguments), expected, atol=1e-5, rtol=1e-5)
    mapped = torch.vmap(lambda x: gated_norm(x, weight=arguments[2]))(arguments[0])
    torch.testing.assert_close(mapped, gated_norm(arguments[0], weight=arguments[2]), atol=1e-5, rtol=1e-5)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3, 4)
    for match, arguments, options in (
        (r"x: seen torch.int64", (x.long(),), {}),
        (r"gate: seen shape \(2, 3\)", (x, x[..., 0]), {}),
        (r"weight: seen shape \(3,\)", (x, None, x[0, :, 0]), {}),
        (r"activation: seen 'relu', wanted one of silu, sigmoid", (x,), {"activation": "relu"}),
    ):
        with pytest.raises(ValueError, match=match):
            gated_norm(*arguments, **options)

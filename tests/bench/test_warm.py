"""All kernels are compiled beforehand, once, for every length, batch, segmentation and state."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map

import tidegate
from tidegate import registry
from tidegate.bench import mixers, ops, warm
from tidegate.ops.gated_norm import gated_norm
from tidegate.ops.selective_scan import selective_scan
from tidegate.segments import Segments


@pytest.fixture(scope="module")
def warmed():
    return list(warm.warm())


def test_every_kernel_is_called(warmed):
    counts = warm.specialisations()
    spread = {name for name, kernel in warm.kernels().items() if warm.shares(kernel)}  # no helper that nobody calls
    assert {"ops.scan.numba_cpu._forward", "ops.linear_attention.numba_cpu.backward_kernel"} <= spread
    assert [name for name in spread if not counts[name]] == [], "bench.ops.CASES or a mixer has to call them"
    assert {name: counts[name] for name in spread if counts[name] > 1} == {}, "compiled more than once"
    assert {one.what for one in warmed} >= {"scan", "delta_rule", "linear_attention", "all mixers", "compiled step"}
    assert all(one.seconds > 0 for one in warmed)


def test_a_second_time_nothing_is_compiled_or_loaded(warmed):
    again = list(warm.warm())
    assert [one.what for one in again] == [one.what for one in warmed]
    assert not any(one.compiled or one.loaded for one in again)


def test_another_process_finds_everything_in_the_cache():
    code = "import sys; from tidegate.cli.main import main; sys.argv[1:] = ['doctor', '--warm', '--json']; main()"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    if not facts["cache"]["writable"]:
        assert facts["warnings"]
        return
    loaded = {name for one in facts["warmed"] for name in one["loaded"]}
    assert [one["compiled"] for one in facts["warmed"] if one["compiled"]] == []
    assert loaded >= {name for name, kernel in warm.kernels().items() if warm.shares(kernel)}


# -- no recompilation --------------------------------------------------------------------------------------------------
SHAPES = [
    ops.Shape(batch=1, time=1, heads=1, key_dim=16, value_dim=16),
    ops.Shape(batch=3, time=33, heads=2, key_dim=5, value_dim=3),
    ops.Shape(batch=2, time=700, heads=3, key_dim=40, value_dim=24),
]
OURS = [name for name in ops.CASES if not name.startswith("torch/")]


def segmentations(batch: int, time: int):
    yield None
    if time > 2:
        yield Segments.packed([[time // 2, time - time // 2]] * batch)
        yield Segments.padded(torch.arange(time).expand(batch, time) % 7 > 0)


def assert_as_before(before: dict[str, int]) -> None:
    after = warm.specialisations()
    assert {name: count for name, count in after.items() if count != before.get(name)} == {}


@pytest.mark.parametrize("name", OURS)
def test_no_recompilation_of_an_op(warmed, name):
    case, before = ops.CASES[name], warm.specialisations()
    with tidegate.backend("numba"):
        for shape in SHAPES:
            inputs = ops.Inputs(shape).take(case.inputs)
            for segments in segmentations(shape.batch, shape.time):
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
                output, state = case.op(*leaves) if segments is None else case.op(*leaves, segments=segments)
                output.sum().backward()
                if state is None:  # no recurrence
                    break
                with torch.no_grad():
                    case.op(*inputs, state=tree_map(torch.detach, state), segments=segments)
    assert_as_before(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_recompilation_for_half_precision(warmed, dtype):
    before = warm.specialisations()
    with tidegate.backend("numba"):
        for name in OURS:
            inputs = [x.to(dtype) for x in ops.Inputs(SHAPES[1]).take(ops.CASES[name].inputs)]
            ops.CASES[name].op(*[x.requires_grad_() for x in inputs])[0].sum().backward()
    assert_as_before(before)


def test_no_recompilation_for_other_forms(warmed):
    before = warm.specialisations()
    with tidegate.backend("numba"):
        a, b = torch.rand(2, 9, 6, requires_grad=True), torch.randn(2, 9, 6, requires_grad=True)
        for decay in (a, a[0, 0].detach(), a.detach() + 0.1j, a[:, :, ::2].repeat_interleave(2, 2)):
            for reverse in (False, True):
                tidegate.ops.scan(decay, b, reverse=reverse)[0].abs().sum().backward()
        q = torch.randn(2, 9, 3, 8, requires_grad=True)
        tidegate.ops.linear_attention(q, q, q, read_before_write=True)[0].sum().backward()
        several = torch.randn(2, 9, 2, 3, 8, requires_grad=True)
        tidegate.ops.delta_rule(q, several, several, torch.rand(2, 9, 2, 3))[0].sum().backward()
        x = torch.randn(2, 6, 9).transpose(1, 2).requires_grad_()  # not contiguous
        for bias, activation in ((torch.randn(6), None), (None, "silu")):
            tidegate.ops.short_convolution(x, torch.randn(6, 3), bias, activation=activation)[0].sum().backward()
        weights = (None, torch.rand(8), torch.rand(3, 8))
        for gate, weight, first in itertools.product((None, q), weights, (False, True)):
            gated_norm(q, gate, weight, activation="sigmoid", norm_before_gate=first).sum().backward()
        u, rates, shared = torch.rand(2, 9, 6, requires_grad=True), -torch.rand(6, 4), torch.randn(2, 9, 4)
        for d, bias, z, negative in itertools.product((None, u[0, 0]), (None, u[0, 0]), (None, u), (False, True)):
            more = {"d": d, "dt_bias": bias, "z": z, "negative_eigenvalues": negative}
            selective_scan(u, u, rates, shared, shared, **more)[0].sum().backward()
    assert_as_before(before)


@pytest.mark.parametrize("name", registry.names())
def test_no_recompilation_of_a_mixer(warmed, name):
    before = warm.specialisations()
    mixer = mixers.build(name, 32)
    for batch, time in ((1, 1), (3, 33), (2, 300)):
        x = torch.randn(batch, time, 32, requires_grad=True)
        for segments in segmentations(batch, time):
            y, state = mixer(x, segments=segments)
            y.sum().backward()
            with torch.no_grad():
                mixer(x[:, :1], state.detach())
    assert_as_before(before)

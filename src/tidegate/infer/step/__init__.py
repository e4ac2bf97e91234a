"""Fast single tokens: a layer's or model's step (T = 1) as one call into compiled code."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tidegate.backend import backend
from tidegate.infer.step.lower import Lowering, fill, hold
from tidegate.infer.step.program import Unsupported
from tidegate.nn.mixer import grows
from tidegate.ops.threads import together
from tidegate.registry import exceptions_of
from tidegate.state import State

__all__ = ["Step", "Unsupported", "compile_step"]

_WORTHWHILE = 1 << 22  # multiplications (half a millisecond); below, a second thread comes too late
ROOM = 8  # addresses of the operands of one row


def compile_step(module: nn.Module, batch_size: int = 1) -> Step:
    """The step of a mixer or language model, for a fixed batch, without gradients.

    `step(x, state)` is `module(x, state)` for T = 1: x is (B, 1, D) for a mixer and (B, 1) token numbers for a model;
    the state is what the module returns and takes, so the two can take turns. The module is traced once, in a tenth of
    a second per layer, into a program of the step machine: nothing is compiled for it, and all modules share the
    compiled interpreter. Weights are read where they are, so training steps and `load_state_dict` are seen (an
    assignment through `.data` is not always: call `step.refresh()` after one). Hooks are traced, those added later not
    seen.

    Raises `Unsupported` for a module on another device than the CPU or of another dtype than float32, whose state grows
    with the sequence, that needs the whole of it at once, or that uses an operator the machine does not know; the
    module itself still works then.

    >>> from tidegate import mixers
    >>> mixer = mixers.build("gla", dim=32, num_heads=2)
    >>> step = compile_step(mixer)
    >>> x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    >>> with torch.no_grad():
    ...     wanted = mixer(x, state)[0]
    >>> torch.allclose(step(x, state)[0], wanted, atol=1e-6)
    True
    """
    return Step(module, batch_size)


class Step:
    """What `compile_step` returns: call it with (x, state)."""

    def __init__(self, module: nn.Module, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: seen {batch_size}, wanted at least 1")
        self.module, self.batch_size = module, batch_size
        self._lock = threading.Lock()  # one workspace: calls from several threads take turns
        self._compile()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.batch_size)  # a copy is compiled for the copied module

    def _compile(self) -> None:
        """Trace the module as it is now."""
        module = self.module
        self._tree = [(part._modules, list(part._modules.values())) for part in module.modules()]
        self._places = {
            name: (_owner(module, name), name.rpartition(".")[2])
            for name, _ in (*module.named_parameters(), *module.named_buffers())
        }
        self._check_weights()
        for part in module.modules():
            if reason := exceptions_of(part).get("streaming"):
                raise Unsupported(f"module: {type(part).__name__} has no step of its own: {reason}")
        if grows(module.state_spec()):  # type: ignore[operator]
            raise Unsupported("module: its state grows with the sequence, so that no two steps are alike")
        state = module.init_state(self.batch_size, dtype=torch.float32, device="cpu")  # type: ignore[operator]
        x = self._example()
        self._takes = [(tuple(t.shape), t.dtype) for t in (x, *state.tensors().values())]
        self._trace(x, state)

    def _check_weights(self) -> None:
        for name, weight in zip(self._places, self._weights(), strict=True):
            if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.int64, torch.bool):
                kind = f"{weight.dtype} on {weight.device}"
                raise Unsupported(f"module: {name} is {kind}; the step machine calculates in float32 on the CPU")

    def _example(self) -> Tensor:
        if getattr(self.module, "vocab_size", None) is not None:
            return torch.zeros(self.batch_size, 1, dtype=torch.int64, device="cpu")
        dim: Any = getattr(self.module, "features", self.module.dim)
        return torch.zeros(self.batch_size, 1, dim, dtype=torch.float32, device="cpu")

    def _trace(self, x: Tensor, state: State) -> None:
        from torch._decomp import core_aten_decompositions, get_decompositions
        from torch.fx.experimental.proxy_tensor import make_fx

        names = list(self._places)

        def step(parameters: list[Tensor], x: Tensor, *leaves: Tensor) -> list[Tensor]:
            tensors = iter(leaves)
            before = state.map(lambda _: next(tensors))
            with backend("reference"):
                given = dict(zip(names, parameters, strict=True))
                y, after = torch.func.functional_call(self.module, given, (x, before))
            self._template = after
            return [y, *after.tensors().values()]

        aten = torch.ops.aten
        more: dict[Any, Any] = get_decompositions(
            [
                aten.addmm,
                aten.elu,
                aten.gelu,
                aten.native_group_norm,
                aten.native_layer_norm,
                aten.silu,
                aten.softplus,
                aten._softmax,
            ]
        )
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                traced = make_fx(
                    torch.func.functionalize(step, remove="mutations"),
                    {**core_aten_decompositions(), **more},
                    tracing_mode="fake",
                )([weight.detach() for weight in self._weights()], x, *state.tensors().values())
        finally:
            for part, training in modes:
                part.training = training
        traced.graph.eliminate_dead_code()
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        count = len(self._places)
        self._graph = traced
        self._placeholders = dict(zip(placeholders[:count], self._weights(), strict=True))
        self._evaluated: dict[fx.Node, Any] = {}
        lowering = Lowering(traced.graph, count, self._evaluate)
        self._program = program = lowering.run()
        self._static_nodes = lowering.statics
        self._workspace = np.zeros(program.workspace + 64, np.uint8)
        self._room = np.zeros(ROOM, np.int64)
        self._counters = np.zeros(1 + 2 * len(program.offered), np.int64)
        self._bases = np.zeros(2 + len(self._static_nodes) + len(self._takes) + len(program.outputs), np.int64)
        self._bases[0] = -(-self._workspace.ctypes.data // 64) * 64
        self._bases[1] = program.constants.ctypes.data
        self._first_input = 2 + len(self._static_nodes)
        self._layouts: list[tuple[Any, ...]] | None = None
        self.refresh()

    # -- weights -------------------------------------------------------------------------------------------------------
    def _evaluate(self, node: fx.Node) -> Any:
        """The value of a node that depends on parameters alone."""
        if node in self._placeholders:
            return self._placeholders[node].detach()
        if node not in self._evaluated:
            filled = fill(node)
            if filled is not None:
                self._evaluated[node] = filled
            elif node.op == "get_attr":
                self._evaluated[node] = getattr(self._graph, str(node.target))
            else:
                arguments, options = fx.node.map_arg((node.args, node.kwargs), self._evaluate)
                with torch.no_grad():
                    self._evaluated[node] = node.target(*arguments, **options)  # type: ignore[operator]
        return self._evaluated[node]

    def refresh(self) -> None:
        """Compute anew what depends on the weights alone.

        Raises ValueError for a weight of another shape than the step was compiled for, Unsupported for another dtype.
        """
        self._check_weights()
        self._placeholders = dict(zip(self._placeholders, self._weights(), strict=True))
        self._evaluated = {}
        statics = [hold(self._evaluate(node)) for node in self._static_nodes]
        if self._layouts is None:
            self._layouts = [(tensor.shape, tensor.stride()) for tensor in statics]
        for position, (shape, stride) in enumerate(self._layouts):
            tensor = statics[position]
            if tensor.shape != shape:
                raise ValueError(
                    f"module: a weight has now the shape {tuple(tensor.shape)}, but this step was compiled for "
                    f"{tuple(shape)}; compile_step again"
                )
            if tensor.stride() != stride:
                statics[position] = torch.empty_strided(shape, stride, dtype=tensor.dtype, device="cpu").copy_(tensor)
        self._statics = statics
        self._bases[2 : self._first_input] = [tensor.data_ptr() for tensor in statics]
        self._stamp = self._seen()

    def _seen(self) -> list[Any]:
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in self._weights()]

    def _weights(self) -> list[Tensor]:
        """Parameters and buffers as they are now; a replaced one is another tensor under the old name."""
        return [tensors[name] for tensors, name in self._places.values()]

    # -- a step --------------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """y and the new state; as the module's, to rounding. Raises ValueError where x or state has another shape."""
        with self._lock:
            if any(list(held.values()) != parts for held, parts in self._tree):
                self._compile()  # a part of the module was replaced
            elif self._seen() != self._stamp:
                self.refresh()
            return self._run(x, state)

    def _run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        from tidegate.infer.step import machine

        program = self._program
        given = [x, *state.tensors().values()]
        if len(given) != len(self._takes):
            raise ValueError("state: has other entries than this step's module keeps; it belongs to another model")
        for position, (tensor, (shape, dtype)) in enumerate(zip(given, self._takes, strict=True)):
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
                what = "x" if position == 0 else "state"
                raise ValueError(
                    f"{what}: seen {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, but this step was "
                    f"compiled for {shape} of {dtype} on the CPU; call the module itself, or compile_step again"
                )
            if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                given[position] = tensor.resolve_conj().resolve_neg().contiguous()
        for index, rows in program.limits:
            tokens = given[index].flatten().tolist()
            if min(tokens) < 0 or max(tokens) >= rows:
                wrong = next(token for token in tokens if not 0 <= token < rows)
                raise ValueError(f"x: seen token {wrong}, but the vocabulary has the tokens 0 to {rows - 1}")
        results = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in program.outputs]
        self._bases[self._first_input :] = [tensor.data_ptr() for tensor in (*given, *results)]
        fixed = (self._bases, program.code, program.offered, self._counters)
        if program.work >= _WORTHWHILE and torch.get_num_threads() > 1:
            self._counters[:] = 0
            together(
                lambda: machine.execute(*fixed, self._room, 1),
                lambda: machine.help_out(*fixed, np.zeros(ROOM, np.int64)),
                self._dismiss,
            )
        else:
            machine.execute(*fixed, self._room, 0)
        new = iter(results[1:])
        return results[0], self._template.map(lambda _: next(new))

    def _dismiss(self) -> None:
        """Let those who help see the end, as `execute` does: it may not have begun."""
        self._counters[0] = len(self._program.offered) + 1


def _owner(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary that holds a parameter or buffer under the last part of its name."""
    owner = module.get_submodule(name.rpartition(".")[0])
    held: Any = owner._parameters if name.rpartition(".")[2] in owner._parameters else owner._buffers
    return held

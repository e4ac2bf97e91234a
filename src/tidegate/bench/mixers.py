"""Timings of the mixers: over lengths, and of single tokens after a short and a long past; and what each costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tidegate import registry
from tidegate.bench import counts, machine
from tidegate.bench.report import Decode, Measurement
from tidegate.bench.roofline import Work
from tidegate.bench.sweep import Call, Candidate, measure
from tidegate.bench.timing import Timing, interleaved
from tidegate.infer.step import Unsupported, compile_step
from tidegate.nn.mixer import GROWS, Mixer, grows
from tidegate.state import State


@dataclass(frozen=True)
class Cost:
    """What a mixer needs, counted rather than measured, in float32 at batch 1.

    A state that grows has `state_bytes_per_token` for every token cached, and then `flops_per_cached_token` come on
    top of `flops_per_token` for each of them.
    """

    parameters: int
    state_bytes: int
    state_bytes_per_token: int
    flops_per_token: int
    flops_per_cached_token: int


def cost(name: str, dim: int = 256, **options: Any) -> Cost:
    """Count a mixer's parameters, state, and floating-point operations per token.

    Per token every matrix is used once (two operations per weight), and every element of the recurrent state costs
    what `registry.FAMILIES` says; inputs kept for convolutions and shifts are no recurrent state. Attention costs that
    much per channel and token looked at, with a window full; so does a convolution as long as the sequence.
    """
    mixer = build(name, dim, **options)
    family = registry.info(name).family
    per_element = registry.FAMILIES[family][1]
    entries = list(_entries(mixer.state_spec()))
    cached = sum(math.prod(n for n in shape if n != GROWS) for shape, _ in entries if GROWS in shape)
    if family == "attention":
        elements = dim * _window(mixer)
    else:
        # A wrapper keeps no state itself; what it wraps runs over one all the same.
        parts = [mixer] if entries else [part for part in mixer.modules() if isinstance(part, Mixer)]
        running = [entry for part in parts for entry in _entries(part.state_spec())]
        elements = sum(math.prod(shape) for shape, recurrent in running if recurrent and GROWS not in shape)
    return Cost(
        parameters=sum(p.numel() for p in mixer.parameters()),
        state_bytes=mixer.init_state(1, dtype=torch.float32).nbytes,
        state_bytes_per_token=4 * cached,
        flops_per_token=2 * sum(p.numel() for p in mixer.parameters() if p.ndim > 1) + per_element * elements,
        flops_per_cached_token=per_element * (cached if family == "convolution" else dim) if cached else 0,
    )


def work(name: str, batch: int, length: int, dim: int = 256, **options: Any) -> tuple[Work, Work]:
    """What a mixer must do over a sequence from its beginning, float32: forward, and forward with backward.

    The operations are those of `cost`, with the window of an attention as full as it is at each token, and a
    convolution as long as the sequence done by FFT; a backward has twice as many. The bytes are the least of any layer:
    input, output, parameters, and the gradients of all three.
    """
    counted = cost(name, dim, **options)
    tokens, pairs = batch * length, batch * length * (length + 1) / 2
    flops = tokens * counted.flops_per_token + pairs * counted.flops_per_cached_token
    family = registry.info(name).family
    if family == "convolution":
        channels = counted.state_bytes_per_token // 4
        shape = counts.Shape(batch, length, heads=1, value_dim=channels)
        flops = tokens * counted.flops_per_token + counts.long_convolution(shape)[0].flops
    if family == "attention":
        window = _window(build(name, dim, **options))
        filling = min(window, length)  # the first tokens find that much of their window empty: sum of window - t
        flops -= registry.FAMILIES[family][1] * dim * batch * (filling * window - filling * (filling + 1) / 2)
    return (
        Work(flops, 4 * (2 * tokens * dim + counted.parameters)),
        Work(3 * flops, 4 * (5 * tokens * dim + 3 * counted.parameters)),
    )


def build(name: str, dim: int, **options: Any) -> Mixer:
    """A mixer of the registry; where its default number of heads does not divide `dim`, its tiny arguments are used."""
    mixer = registry.build(name, dim, **(options or fitting(name, dim)))
    assert isinstance(mixer, Mixer)
    return mixer


def fitting(name: str, dim: int) -> dict[str, Any]:
    """The options with which a mixer takes the width `dim`: none, or those it is tested with at a small width."""
    tiny = dict(registry.info(name).tiny)
    return {} if not tiny or _takes(name, dim) else tiny


@cache
def _takes(name: str, dim: int) -> bool:
    try:
        registry.build(name, dim)
    except ValueError:
        return False
    return True


def _window(mixer: Mixer) -> int:
    """How many tokens an attention looks back on at most; 0 without a limit."""
    return max((s[0] for s, _ in _entries(mixer.state_spec()) if len(s) > 1 and GROWS not in s), default=0)


def _entries(spec: Mapping[str, Any]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Shape of every leaf, and whether it accumulates (it does not where it keeps inputs or counts)."""
    for inner in spec.values():
        if isinstance(inner, Mapping):
            yield from _entries(inner)
        elif len(inner) == 2 and isinstance(inner[1], torch.dtype | str):
            yield tuple(inner[0]), inner[1] != "input" and inner[1] != torch.int64
        else:
            yield tuple(inner), True


def sweep(
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    dim: int = 256,
    repetitions: int = 7,
    patience: float = 5.0,
    ceilings: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Measurement]:
    """Time every mixer at every length, forward and with backward into input and parameters.

    All lengths of a mixer take turns, so that the change of its cost with the length is free of the machine's moods,
    and with them the machine's ceilings (of the sizes in `ceilings`, see `machine.ceilings`). A mixer whose state grows
    is left out of lengths at which one call would take longer than `patience` seconds.
    Raises ValueError for an unknown name.
    """
    known(names)
    limits = machine.ceilings(**ceilings)
    for name in names:
        mixer = build(name, dim)
        taken: list[Candidate] = []
        for length in sorted(lengths):
            calls = _runs(mixer, batch, length)
            taken.append(Candidate(name, batch, length, *calls, *work(name, batch, length, dim)))
            if grows(mixer.state_spec()) and 4 * interleaved(calls[1:], 1, shortest=0)[0].median > patience:
                break
        yield from measure(taken, limits, repetitions, patience)


def prepare(name: str, *, batch: int, length: int, dim: int) -> Call:
    """Forward with backward into input and parameters of one mixer, as a call; parameters and input are made here."""
    return _runs(build(name, dim), batch, length)[1]


def known(names: Sequence[str]) -> None:
    """Raise ValueError for the first name that is no mixer, before anything is measured."""
    for name in names:
        registry.info(name)


def _runs(mixer: Mixer, batch: int, length: int) -> tuple[Call, Call]:
    x, gradient = torch.randn(batch, length, mixer.dim), torch.randn(batch, length, mixer.dim)
    leaf = x.detach().requires_grad_()  # the same memory
    leaves = [leaf, *mixer.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return mixer(x)

    def training() -> object:
        return torch.autograd.grad(mixer(leaf)[0], leaves, gradient, allow_unused=True)

    return forward, training


def decode(
    names: Sequence[str],
    contexts: Sequence[int] = (100, 100_000),
    *,
    batch: int = 1,
    dim: int = 256,
    chunk: int = 4096,
    repetitions: int = 15,
) -> Iterator[Decode]:
    """Time one token (T = 1) after each number of tokens in `contexts`, which were fed in pieces of `chunk`.

    The mixer itself and its compiled step, where it has one, take turns over all contexts. Raises ValueError for an
    unknown name, and for a mixer that does not stream.
    """
    known(names)
    if whole := [name for name in names if not registry.info(name).streams]:
        raise ValueError(f"names: {', '.join(whole)} has no single tokens to time; it needs the whole sequence at once")
    for name in names:
        mixer = build(name, dim).eval()
        token = torch.randn(batch, 1, dim)
        try:
            calls: list[Callable[[Tensor, State], object]] = [mixer, compile_step(mixer, batch)]
        except Unsupported:
            calls = [mixer]
        with torch.no_grad():
            states = [_after(mixer, context, batch, chunk) for context in contexts]
            timings = interleaved([_step(call, token, state) for call in calls for state in states], repetitions)
        count = len(contexts)
        compiled: list[Timing | None] = [*timings[count:]] or [None] * count
        for context, state, timing, fast in zip(contexts, states, timings[:count], compiled, strict=True):
            yield Decode(name, context, timing, fast, state.nbytes, batch, torch.get_num_threads())


def _after(mixer: Mixer, context: int, batch: int, chunk: int) -> State:
    state = mixer.init_state(batch, dtype=torch.float32)
    for begin in range(0, context, chunk):
        state = mixer(torch.randn(batch, min(chunk, context - begin), mixer.dim), state)[1]
    return state


def _step(call: Callable[[Tensor, State], object], token: Tensor, state: State) -> Call:
    return lambda: call(token, state)

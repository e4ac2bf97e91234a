"""Timings of the mixers: over lengths, and of single tokens after a short and a long past; and what each costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidegate import registry
from tidegate.bench.report import Decode, Measurement
from tidegate.bench.timing import interleaved
from tidegate.nn.mixer import GROWS, Mixer
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
    much per channel and token looked at, with a window full.
    """
    mixer = build(name, dim, **options)
    family = registry.info(name).family
    per_element = registry.FAMILIES[family][1]
    entries = list(_entries(mixer.state_spec()))
    cached = sum(math.prod(n for n in shape if n != GROWS) for shape, _ in entries if GROWS in shape)
    if family == "attention":
        elements = dim * max((shape[0] for shape, _ in entries if len(shape) > 1 and GROWS not in shape), default=0)
    else:
        elements = sum(math.prod(shape) for shape, recurrent in entries if recurrent and GROWS not in shape)
    return Cost(
        parameters=sum(p.numel() for p in mixer.parameters()),
        state_bytes=mixer.init_state(1, dtype=torch.float32).nbytes,
        state_bytes_per_token=4 * cached,
        flops_per_token=2 * sum(p.numel() for p in mixer.parameters() if p.ndim > 1) + per_element * elements,
        flops_per_cached_token=per_element * dim if cached else 0,
    )


def build(name: str, dim: int, **options: Any) -> Mixer:
    """A mixer of the registry; where its default number of heads does not divide `dim`, its tiny arguments are used."""
    try:
        mixer = registry.build(name, dim, **options)
    except ValueError:
        tiny = registry.info(name).tiny
        if options or not tiny:
            raise
        mixer = registry.build(name, dim, **tiny)
    assert isinstance(mixer, Mixer)
    return mixer


def grows(mixer: Mixer) -> bool:
    """Whether the state lengthens with the sequence."""
    return any(GROWS in shape for shape, _ in _entries(mixer.state_spec()))


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
) -> Iterator[Measurement]:
    """Time every mixer at every length, forward and with backward into input and parameters.

    All lengths of a mixer take turns, so that the change of its cost with the length is free of the machine's moods.
    A mixer whose state grows is left out of lengths at which one call would take longer than `patience` seconds.
    """
    for name in names:
        mixer = build(name, dim)
        taken: list[int] = []
        runs: list[Callable[[], object]] = []
        for length in sorted(lengths):
            x = torch.randn(batch, length, dim)
            pair = _runs(mixer, x, torch.randn_like(x))
            taken.append(length)
            runs += pair
            if grows(mixer) and 4 * interleaved(pair[1:], 1, shortest=0)[0].median > patience:
                break
        timings = interleaved(runs, repetitions, patience=patience)
        for position, length in enumerate(taken):
            forward, training = timings[2 * position : 2 * position + 2]
            yield Measurement(name, length, batch * length, forward, training)


def _runs(mixer: Mixer, x: Tensor, gradient: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    leaf = x.clone().requires_grad_()
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
    """Time one token (T = 1) after each number of tokens in `contexts`, which were fed in pieces of `chunk`."""
    for name in names:
        mixer = build(name, dim).eval()
        token = torch.randn(batch, 1, dim)
        with torch.no_grad():
            states = [_after(mixer, context, batch, chunk) for context in contexts]
            timings = interleaved([_step(mixer, token, state) for state in states], repetitions)
        for context, state, timing in zip(contexts, states, timings, strict=True):
            yield Decode(name, context, timing, state.nbytes)


def _after(mixer: Mixer, context: int, batch: int, chunk: int) -> State:
    state = mixer.init_state(batch, dtype=torch.float32)
    for begin in range(0, context, chunk):
        state = mixer(torch.randn(batch, min(chunk, context - begin), mixer.dim), state)[1]
    return state


def _step(mixer: Mixer, token: Tensor, state: State) -> Callable[[], object]:
    return lambda: mixer(token, state)

"""Timings of whole language models: one training step of every mixer, beside a Transformer of the same size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.nn.functional import cross_entropy

from tidegate.bench import machine, mixers
from tidegate.bench.report import Measurement
from tidegate.bench.roofline import Work
from tidegate.bench.sweep import Call, Candidate, measure
from tidegate.models.language import LanguageModel
from tidegate.nn.mixer import grows
from tidegate.nn.parts import feed_forward_width
from tidegate.nn.weight_decay import weight_decay_groups

PEER = "attention"  # the Transformer: softmax attention, computed by PyTorch's own fused kernel
LONGEST = 120.0  # seconds of one step, up to which a model whose state grows is still measured


def build(name: str, dim: int = 256, layers: int = 4, vocabulary: int = 256) -> LanguageModel:
    """`layers` blocks of a mixer and a SwiGLU, with as many parameters as the Transformer of these sizes.

    What a mixer has more or less than softmax attention, its feed-forward part has less or more, to a multiple of 16
    channels; a mixer as large as the Transformer's whole block has none.
    """
    width = hidden(name, dim)
    return LanguageModel(
        vocabulary,
        dim,
        [(name, mixers.fitting(name, dim))] * layers,
        feed_forward="swiglu" if width else "none",
        feed_forward_dim=width or None,
    )


def hidden(name: str, dim: int) -> int:
    """Width of the feed-forward part beside this mixer, 0 for none."""
    own, peer = (mixers.cost(mixer, dim).parameters for mixer in (name, PEER))
    return max(0, 16 * round((feed_forward_width(dim) + (peer - own) / (3 * dim)) / 16))


def work(
    name: str, batch: int, length: int, dim: int = 256, layers: int = 4, vocabulary: int = 256
) -> tuple[Work, Work]:
    """What a model must do: forward with the loss, and a whole training step (three times the forward, and AdamW).

    Per layer the mixer's own (`mixers.work`) and two operations per feed-forward weight and token, and the head. AdamW
    reads the weights, their gradients and two moments, and writes all but the gradients.
    """
    tokens, weights = batch * length, 3 * dim * hidden(name, dim)
    products = 2 * tokens * (layers * weights + vocabulary * dim)
    forward, training = (one.times(layers) for one in mixers.work(name, batch, length, dim))
    parameters = layers * (mixers.cost(name, dim).parameters + weights) + vocabulary * dim
    return (
        forward + Work(products, 4 * (layers * weights + vocabulary * dim)),
        training + Work(3 * products, 4 * (3 * (layers * weights + vocabulary * dim) + 7 * parameters)),
    )


def sweep(
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    dim: int = 256,
    layers: int = 4,
    vocabulary: int = 256,
    repetitions: int = 7,
    patience: float = 5.0,
    longest: float = LONGEST,
    ceilings: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Measurement]:
    """Time every model and the Transformer at every length: forward with the loss, and a whole training step.

    Per length all models and the machine's ceilings take turns. A model whose state grows is left out of lengths at
    which one step would take longer than `longest` seconds, judged by the length before.
    Raises ValueError for an unknown name.
    """
    names = list(dict.fromkeys([*names, PEER]))
    mixers.known(names)
    limits = machine.ceilings(**ceilings)
    models = {name: build(name, dim, layers, vocabulary) for name in names}
    growing = {name for name in names if grows(mixers.build(name, dim).state_spec())}
    steps: dict[str, tuple[int, float]] = {}  # of the growing ones: the length before, and the seconds of a step there
    for length in sorted(lengths):
        present = [
            Candidate(
                name,
                batch,
                length,
                *_runs(model, batch, length),
                *work(name, batch, length, dim, layers, vocabulary),
                model.num_parameters,
            )
            for name, model in models.items()
            if name not in steps or steps[name][1] * (length / steps[name][0]) ** 2 <= longest
        ]
        for found in measure(present, limits, repetitions, patience):
            yield found
            if found.name in growing:
                steps[found.name] = length, found.training.median


def prepare(name: str, *, batch: int, length: int, dim: int, layers: int, vocabulary: int) -> Call:
    """A training step of one model, as a call; model and batch are made here."""
    return _runs(build(name, dim, layers, vocabulary), batch, length)[1]


def _runs(model: LanguageModel, batch: int, length: int) -> tuple[Call, Call]:
    model.train()
    # As `tidegate train` does it, with steps so small that the model stays what it is.
    optimiser = torch.optim.AdamW(weight_decay_groups(model, 0.1), lr=1e-6, fused=True)
    ids = torch.randint(model.vocab_size, (batch, length + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()

    def loss() -> torch.Tensor:
        return cross_entropy(model(inputs)[0].flatten(0, 1), targets)

    def forward() -> object:
        with torch.no_grad():
            return loss()

    def training() -> object:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimiser.step()
        return value

    return forward, training

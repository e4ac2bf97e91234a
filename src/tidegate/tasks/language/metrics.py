"""How well a model predicts held-out text: bits per byte and perplexity, exactly, at any length.

Every document is read from its beginning to its end with its state carried along, however long it is: the stream is
laid in a few rows, cut between documents, and walked window by window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tidegate.nn.mixer import GROWS, Mixer
from tidegate.state import State
from tidegate.tasks.language.data import segments_of
from tidegate.tasks.language.tokenizer import Tokenizer

_LOGITS = 1 << 24  # elements of one window's logits, which bounds the memory


@dataclass(frozen=True)
class Score:
    """The code length of a text. The documents' ends are predicted and paid for like every other token."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs per byte of text; does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; comparable only between models with the same tokenizer."""
        return math.exp(min(self.nats / self.tokens, 700)) if self.tokens else math.nan

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def text_bytes(stream: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of text in a token stream."""
    return sum(size for _, size in _sizes(stream, tokenizer))


def byte_stream(stream: np.ndarray, tokenizer: Tokenizer, limit: int | None = None) -> np.ndarray:
    """The bytes behind a token stream, with 255 for boundaries: what the n-gram model reads. Stops near `limit`."""
    if tokenizer.kind == "bytes":
        return stream[:limit]
    table = tokenizer.token_bytes()
    table[tokenizer.boundary] = b"\xff"
    parts, size = [], 0
    for begin in range(0, len(stream), 1 << 20):
        part = b"".join(table[i] for i in stream[begin : begin + (1 << 20)].tolist())
        parts.append(np.frombuffer(part, np.uint8))
        size += len(part)
        if limit is not None and size >= limit:
            break
    return np.concatenate(parts)[:limit]


def shortened(stream: np.ndarray, tokens: int | None, boundary: int) -> np.ndarray:
    """The first documents of a stream, about `tokens` long; one longer than that is cut."""
    if tokens is None or len(stream) <= tokens:
        return stream
    ends = np.flatnonzero(stream[:tokens] == boundary)
    return stream[: ends[-1] + 1] if ends[-1] > tokens // 2 else stream[:tokens]


def growing_state(model: nn.Module) -> bool:
    """Whether the model's state lengthens with the text (full attention keeps every key and value)."""
    return any(
        any(GROWS in (spec[0] if isinstance(spec[0], tuple) else spec) for spec in module.state_spec().values())
        for module in model.modules()
        if isinstance(module, Mixer)
    )


def evaluate(
    model: nn.Module,
    stream: np.ndarray,
    tokenizer: Tokenizer,
    *,
    rows: int = 16,
    length: int = 512,
    part: tuple[int, int] = (0, 1),
    on_window: Callable[[int], None] | None = None,
) -> Score:
    """Score `model` on a token stream (documents with boundaries before, between and after them).

    Memory does not depend on the stream's length. For a model whose state grows with the text, the context is cut to
    `length` tokens where a document is longer, or it could not be constant. `part` = (i, n) scores the i-th of n parts,
    whose scores add up to the whole; `on_window` receives the number of tokens of each window.
    """
    device = next(model.parameters()).device
    length = max(1, min(length, _LOGITS // (rows * tokenizer.vocab_size)))
    spans = _spans(stream, rows * part[1], tokenizer.boundary)[part[0] :: part[1]]
    spans = sorted(spans, key=lambda span: span[0] - span[1])  # longest first: the rows still running are a prefix
    sizes = np.array([len(piece) for piece in tokenizer.token_bytes()])
    cut = growing_state(model)
    score = Score(0.0, 0, 0)
    state: State | None = None
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for inputs, targets, valid in _windows(stream, spans, length):
                rows_left = len(inputs)
                if state is not None:
                    state = None if cut else state.select(slice(0, rows_left))
                segments = segments_of(inputs, tokenizer.boundary, valid).to(device)
                logits, state = model(inputs.to(device), state, segments=segments)
                losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten(), reduction="none")
                nats = losses.double()[valid.flatten().to(device)].sum().item()
                known = targets[valid].numpy()
                score += Score(nats, len(known), int(sizes[known].sum()))
                if on_window is not None:
                    on_window(len(known))
    finally:
        model.train(was_training)
    return score


def _windows(stream: np.ndarray, spans: list[tuple[int, int]], length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, targets, valid) of each window; finished rows drop out, a row's last window is padded on the right."""
    longest = max((end - begin for begin, end in spans), default=0)
    for offset in range(0, longest, length):
        running = [(begin + offset, end) for begin, end in spans if begin + offset < end]
        width = min(length, longest - offset)
        tokens = np.zeros((len(running), width + 1), np.int64)
        sizes = np.empty(len(running), np.int64)
        for row, (begin, end) in enumerate(running):
            piece = stream[begin : min(begin + width, end) + 1]
            tokens[row, : len(piece)] = piece
            sizes[row] = len(piece) - 1
        both = torch.from_numpy(tokens)
        valid = torch.from_numpy(np.arange(width) < sizes[:, None])
        yield both[:, :-1], both[:, 1:], valid


def _spans(stream: np.ndarray, rows: int, boundary: int) -> list[tuple[int, int]]:
    """Up to `rows` stretches (first input, last target) of about equal size, cut at boundaries; none is empty."""
    last = len(stream) - 1
    cuts = [0]
    for row in range(1, rows):
        at = last * row // rows
        while at < last:  # the next boundary from here on, looked for piecewise: a document may be gigabytes
            found = np.flatnonzero(stream[at : min(at + (1 << 20), last)] == boundary)
            if len(found):
                at += int(found[0])
                break
            at = min(at + (1 << 20), last)
        if cuts[-1] < at < last:
            cuts.append(at)
    return [(begin, end) for begin, end in zip(cuts, [*cuts[1:], last], strict=True) if end > begin]


def _sizes(stream: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    sizes = np.array([len(piece) for piece in tokenizer.token_bytes()])
    for begin in range(0, len(stream), 1 << 20):
        piece = stream[begin : begin + (1 << 20)]
        yield len(piece), int(sizes[piece].sum())

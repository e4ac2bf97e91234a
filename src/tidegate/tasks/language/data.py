"""Text to training rows: tokenised once into memory-mapped files, split by document, cut into windows.

On disk a corpus is `train.bin` and `held_out.bin`: documents laid end to end, a boundary token before, between and
after them. A row is a window of that stream; its segments start wherever the boundary token stands, so no boundary
list is needed and nothing leaks across documents. Which window is which row is a pure function of (seed, row).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.cache import cache_folder
from tidegate.segments import Segments
from tidegate.tasks.language.corpus import Document, Source, open_source, tail_at_paragraph
from tidegate.tasks.language.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

BPE_SAMPLE = 16 << 20  # bytes of text the merges are learnt from
_VERSION = 3  # of the files' layout


@dataclass(frozen=True)
class Corpus:
    """A tokenised text: `train` and `held_out` are memory-mapped token streams."""

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    summary: dict[str, Any]

    def describe(self) -> str:
        """One line for people: sizes and how the text was split."""
        s = self.summary
        return (
            f"{s['name']}: {s['train_bytes'] / 1e6:.2f} MB in {s['train_documents']:,} documents to learn, "
            f"{s['held_out_bytes'] / 1e6:.2f} MB in {s['held_out_documents']:,} held out ({s['split']}); "
            f"{self.tokenizer.kind}, vocabulary {self.tokenizer.vocab_size}"
        )


def prepare(
    text: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | Tokenizer = "bytes",
    vocab_size: int = 4096,
    field: str = "text",
    held_out: float = 0.05,
) -> Corpus:
    """Tokenise `text` (see `open_source`) into the cache, or open what is there already.

    `tokenizer` is "bytes", "bpe" (learnt from this text) or a finished one; `held_out` the share of the text kept
    for evaluation, by whole documents where there are several, 1.0 for all of it.
    Raises ValueError or OSError with one line naming cause and fix.
    """
    source = open_source(text, field)
    if isinstance(tokenizer, str):
        kind = json.dumps([tokenizer, vocab_size if tokenizer == "bpe" else 256])
    else:
        kind = json.dumps([tokenizer.kind, hashlib.sha256(b"\0".join(tokenizer.token_bytes())).hexdigest()])
    key = hashlib.sha256(json.dumps([_VERSION, source.fingerprint, kind, held_out]).encode()).hexdigest()[:24]
    folder = cache_folder() / "corpora" / key
    if not (folder / "summary.json").is_file():
        _write(source, tokenizer, vocab_size, held_out, folder)
    return open_corpus(folder)


def open_corpus(folder: Path) -> Corpus:
    """Map a tokenised corpus that `prepare` wrote."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    train = np.memmap(folder / "train.bin", summary["dtype"], mode="r")
    held_out = np.memmap(folder / "held_out.bin", summary["dtype"], mode="r")
    return Corpus(folder, load_tokenizer(folder), train, held_out, summary)


# -- training rows -----------------------------------------------------------------------------------------------------
class Rows:
    """Training rows of `length` tokens: `rows.batch(k, n)` gives rows k .. k + n - 1 of an endless shuffled order.

    Every epoch visits each window once, in an order of its own and shifted by an amount of its own, so that windows
    are not always cut at the same places. Nothing is stored: the order is a keyed permutation, computed where needed.

    Raises ValueError if the text is shorter than one row.
    """

    def __init__(self, stream: np.ndarray, length: int, boundary: int, seed: int) -> None:
        if len(stream) < length + 1:
            raise ValueError(
                f"the text to learn has {len(stream):,} tokens, but one row takes training.length + 1 = "
                f"{length + 1:,}; give more text or a --length below {len(stream):,}"
            )
        self.stream, self.length, self.boundary, self.seed = stream, length, boundary, seed
        self.windows = (len(stream) - 1) // length

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each (count, length) int64: the target of a token is the one after it."""
        rows = np.empty((count, self.length + 1), np.int64)
        for row, begin in enumerate(self._begins(first, count)):
            rows[row] = self.stream[begin : begin + self.length + 1]
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _begins(self, first: int, count: int) -> list[int]:
        begins = []
        for index in range(first, first + count):
            epoch, within = divmod(index, self.windows)
            key = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=32).digest()
            shift = int.from_bytes(key[:8], "little") % self.length if epoch else 0
            begin = permuted(within, self.windows, key[8:]) * self.length + shift
            begins.append(min(begin, len(self.stream) - 1 - self.length))  # the last window has less room to shift
        return begins


def permuted(index: int, size: int, key: bytes) -> int:
    """Where `index` goes under a permutation of range(size) chosen by `key` (24 bytes), without storing it.

    A Feistel network of six rounds on the next even number of bits, walked until it lands inside the range.

    >>> sorted(permuted(i, 10, b"k" * 24) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 24, 4)]
    while True:
        left, right = index >> half, index & mask
        for number in rounds:
            mixed = ((right ^ number << 32) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 32) & mask)
        index = (left << half) | right
        if index < size:
            return index


def segments_of(inputs: Tensor, boundary: int, valid: Tensor | None = None) -> Segments:
    """Documents start at boundary tokens; a row that begins inside one continues from the state passed in."""
    starts = inputs == boundary
    valid = torch.ones_like(starts) if valid is None else valid
    return Segments(starts & valid, valid)


# -- writing -----------------------------------------------------------------------------------------------------------
def _write(source: Source, tokenizer: str | Tokenizer, vocab_size: int, held_out: float, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        if isinstance(tokenizer, str):
            tokenizer = _make_tokenizer(source, tokenizer, vocab_size)
        writer = _Writer(partial, tokenizer)
        split = writer.write(source, held_out)
        if not split:  # too few documents to hold a whole one out
            writer = _Writer(partial, tokenizer)
            split = writer.write(source, held_out, cut_last=True)
        tokenizer.save(partial)
        summary = {"name": source.name, "split": split, **writer.summary()}
        (partial / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        try:
            os.replace(partial, folder)
        except OSError:
            if not (folder / "summary.json").is_file():  # else another process was faster: the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_tokenizer(source: Source, kind: str, vocab_size: int) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind != "bpe":
        raise ValueError(f"data.tokenizer: seen {kind!r}, wanted 'bytes' or 'bpe'")
    size = source.size or sum(document.size for document in source.documents())
    share = min(1.0, BPE_SAMPLE / max(size, 1))

    def sample() -> Iterator[bytes]:
        due = 0.0  # every chunk adds its share; one is taken whenever a whole one has come together
        for document in source.documents():
            if document.held_out:
                continue
            for chunk in document.chunks():
                due += share
                if due >= 1 - 1e-9:
                    due -= 1
                    yield chunk

    return BPETokenizer.train(sample(), vocab_size)


class _Writer:
    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.folder = tokenizer, folder
        self.dtype = (
            np.uint8 if tokenizer.vocab_size <= 256 else np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
        )
        self.bytes, self.documents = [0, 0], [0, 0]  # of train, held out

    def write(self, source: Source, share: float, cut_last: bool = False) -> str:
        """Tokenise everything; returns how the text was split, or "" if nothing could be held out by document."""
        with open(self.folder / "train.bin", "wb") as train, open(self.folder / "held_out.bin", "wb") as held:
            self.files = (train, held)
            for file in self.files:
                self._put(file, np.array([self.tokenizer.boundary]))
            last: Document | None = None
            for document in source.documents():
                if last is not None:
                    self._document(last, self._choose(last, share) if not cut_last else False)
                last = document
            if last is not None and cut_last:
                self._cut(last, share)
            elif last is not None:
                self._document(last, self._choose(last, share))
        if not sum(self.bytes):
            raise ValueError(f"{source.name}: there is no text in it; give UTF-8 text to learn from")
        if cut_last:
            if not all(self.bytes):
                raise ValueError(
                    f"{source.name}: {sum(self.bytes)} bytes are too few to hold a part out; give more text"
                )
            whole = "the last part of the only document" if sum(self.documents) <= 2 else "the end of the last document"
            return f"{whole}, from a paragraph on"
        if not self.bytes[1]:
            return ""
        return "everything" if share >= 1 else "by package" if last and last.held_out is not None else "by document"

    def summary(self) -> dict[str, Any]:
        names = ("train", "held_out")
        return {
            "dtype": np.dtype(self.dtype).name,
            **{f"{name}_bytes": n for name, n in zip(names, self.bytes, strict=True)},
            **{f"{name}_documents": n for name, n in zip(names, self.documents, strict=True)},
        }

    def _choose(self, document: Document, share: float) -> bool:
        """Held out or not: whichever keeps the held-out share closest to what was asked, in the order of documents."""
        if document.held_out is not None and share < 1:
            return document.held_out
        total = sum(self.bytes) + document.size
        return share >= 1 or self.bytes[1] + document.size / 2 < share * total

    def _document(self, document: Document, held_out: bool) -> None:
        for chunk in document.chunks():
            self._text(held_out, chunk)
        self._end(held_out)

    def _cut(self, document: Document, share: float) -> None:
        """The last document's tail is held out: as much as is asked of the whole, at most half of the document."""
        wanted = min(share * (sum(self.bytes) + document.size), document.size / 2)
        tail_seen = False
        for is_tail, chunk in tail_at_paragraph(document.chunks(), int(document.size - wanted)):
            if is_tail and not tail_seen:
                self._end(False)
                tail_seen = True
            self._text(is_tail, chunk)
        self._end(tail_seen)

    def _text(self, held_out: bool, chunk: bytes) -> None:
        self._put(self.files[held_out], self.tokenizer.encode_chunk(chunk))
        self.bytes[held_out] += len(chunk)

    def _end(self, held_out: bool) -> None:
        self._put(self.files[held_out], np.array([self.tokenizer.boundary]))
        self.documents[held_out] += 1

    def _put(self, file: Any, ids: np.ndarray) -> None:
        file.write(ids.astype(self.dtype).tobytes())

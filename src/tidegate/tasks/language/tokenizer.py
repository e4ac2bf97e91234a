"""Text to token ids and back: bytes, or byte-pair encoding learnt from the corpus."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tidegate.state import write_atomically

FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What a model's text goes through. `boundary` stands before, between and after documents; it has no text."""

    kind: str
    vocab_size: int
    boundary: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without boundaries."""
        ...

    def encode_chunk(self, chunk: bytes) -> np.ndarray:
        """Token ids of UTF-8 bytes, as the corpus is stored."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become replacement characters, boundaries vanish."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for."""
        ...

    def stream(self) -> Stream:
        """A decoder that takes ids one at a time."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` into a folder."""
        ...


class Stream:
    """Ids in, text out, one at a time: a character appears as soon as its last byte has arrived."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became complete with this token."""
        return self._decoder.decode(self._table[token])

    def flush(self) -> str:
        """What is left at the end: a replacement character for half a character."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """One token per byte. 255 never occurs in UTF-8, so it serves as the boundary and ids stay one byte wide.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> stream = tokenizer.stream()
    >>> [stream.feed(token) for token in (104, 195, 169)]
    ['h', '', 'é']
    """

    kind = "bytes"
    vocab_size = 256
    boundary = 255

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def encode_chunk(self, chunk: bytes) -> np.ndarray:
        return np.frombuffer(chunk, np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.boundary).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) if i != self.boundary else b"" for i in range(self.vocab_size)]

    def stream(self) -> Stream:
        return Stream(self.token_bytes())

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomically(Path(folder) / FILE, json.dumps({"tidegate": "bytes"}).encode())


class BPETokenizer:
    """Byte-level byte-pair encoding (Hugging Face `tokenizers`): every text can be encoded, no token is unknown."""

    kind = "bpe"
    boundary = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()

    @staticmethod
    def train(chunks: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Learn the merges from a sample of the corpus. Raises ValueError for fewer than 257 tokens."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(f"data.vocab_size: seen {vocab_size}, wanted at least 257: every byte and the boundary")
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|document|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((chunk.decode() for chunk in chunks), trainer)
        # The marker is a number, not a spelling: text that contains "<|document|>" must not end a document.
        inner.encode_special_tokens = True
        return BPETokenizer(inner)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text.encode(errors="replace").decode()).ids

    def encode_chunk(self, chunk: bytes) -> np.ndarray:
        lines = chunk.decode().splitlines(keepends=True)
        # Some hundred lines at a time: the encoder's cost grows faster than the length of a text.
        blocks = ["".join(lines[i : i + 256]) for i in range(0, len(lines), 256)]
        ids = [np.asarray(encoding.ids, np.uint32) for encoding in self._inner.encode_batch_fast(blocks)]
        return np.concatenate(ids) if ids else np.zeros(0, np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        table = self.token_bytes()
        return b"".join(table[i] for i in ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        to_byte = {character: byte for byte, character in _byte_alphabet()}
        names = (self._inner.id_to_token(i) for i in range(self.vocab_size))
        return [b"", *(bytes(to_byte[c] for c in name) for i, name in enumerate(names) if i != self.boundary)]

    def stream(self) -> Stream:
        return Stream(self.token_bytes())

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomically(Path(folder) / FILE, self._inner.to_str().encode())


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer saved in a run's folder. Raises FileNotFoundError or ValueError for a missing or damaged file."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a training run")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content.get("tidegate") == "bytes":
            return ByteTokenizer()
        from tokenizers import Tokenizer as Inner

        inner = Inner.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error}); it may be truncated") from None
    inner.encode_special_tokens = True
    return BPETokenizer(inner)


def _byte_alphabet() -> Iterator[tuple[int, str]]:
    """Which printable character stands for which byte in a byte-level vocabulary: itself, or the next from 256 on."""
    free = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            yield byte, chr(byte)
        else:
            yield byte, chr(free)
            free += 1

"""Where text comes from: a file, a directory, JSONL, or the English that is installed with this package.

Everything is read in pieces, so a file may be larger than memory. A document is a stream of UTF-8 chunks; chunks end
at a line where there is one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
_SNIFF = 1 << 16

# Dependencies of tidegate itself, so always there. The first three are learnt, the last is held out: the split is by
# package, because documents of one package share turns of phrase. (torch would add 4 MB, and 10 s of parsing.)
TRAIN_PACKAGES = ("sympy", "numpy", "matplotlib")
HELD_OUT_PACKAGES = ("networkx",)
_HELD_OUT_BYTES = 500_000


@dataclass(frozen=True)
class Document:
    """One text. `held_out` is None where the split is still to be decided."""

    name: str
    size: int  # bytes, as far as known before reading
    chunks: Callable[[], Iterator[bytes]]
    held_out: bool | None = None


@dataclass(frozen=True)
class Source:
    """A collection of documents in a fixed order, and a fingerprint that changes when the text does."""

    name: str
    fingerprint: str
    size: int
    documents: Callable[[], Iterator[Document]]


def open_source(text: str | os.PathLike[str] | None = None, field: str = "text") -> Source:
    """The documents of a text file, a JSONL file (one document per line, in `field`) or a directory of them.

    Without `text`, the built-in English: docstrings of installed packages.
    Raises FileNotFoundError or ValueError (empty, binary, no text inside) with the cause and the fix.
    """
    if text is None:
        return builtin()
    path = Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; give a text file, a JSONL file or a directory")
    files, skipped = _files_below(path) if path.is_dir() else ([path], 0)
    sizes = [file.stat().st_size for file in files]
    if not sum(sizes):
        found = f"no text file in this directory ({skipped} binary skipped)" if path.is_dir() else "the file is empty"
        raise ValueError(f"{path}: {found}; give UTF-8 text to learn from")
    stamps = [(str(f.resolve()), size, f.stat().st_mtime_ns) for f, size in zip(files, sizes, strict=True)]
    fingerprint = json.dumps([stamps, field if any(f.suffix == ".jsonl" for f in files) else ""])
    name = f"{path} ({len(files)} files)" if path.is_dir() else str(path)
    name += f", {skipped} binary files skipped" if skipped else ""

    def documents() -> Iterator[Document]:
        for file, size in zip(files, sizes, strict=True):
            if file.suffix == ".jsonl":
                yield from _jsonl(file, field)
            elif size:
                yield Document(str(file), size, lambda file=file: _chunks(file))  # type: ignore[misc]

    return Source(name, fingerprint, sum(sizes), documents)


def tail_at_paragraph(chunks: Iterator[bytes], cut: int) -> Iterator[tuple[bool, bytes]]:
    """Split one document near byte `cut`, at the next paragraph, line or space: yields (is_tail, chunk)."""
    seen, tail = 0, False
    for chunk in chunks:
        if tail or seen + len(chunk) <= cut:
            yield tail, chunk
        else:
            at = max(cut - seen, 0)
            ends = (found + len(s) for s in (b"\n\n", b"\n", b" ") if (found := chunk.find(s, at)) >= 0)
            at = next((end for end in ends if end < len(chunk)), at)  # a line break at the very end leaves no tail
            while at < len(chunk) and chunk[at] & 0xC0 == 0x80:  # never inside a character
                at += 1
            yield False, chunk[:at]
            yield True, chunk[at:]
            tail = True
        seen += len(chunk)


# -- files -------------------------------------------------------------------------------------------------------------
def _files_below(folder: Path) -> tuple[list[Path], int]:
    """All files that look like text, in order of their path, and how many did not."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    texts = [path for path in files if _looks_like_text(path)]
    return texts, len(files) - len(texts)


def _looks_like_text(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(_SNIFF)
    try:
        head[: _character_boundary(head)].decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in chunks of about 1 MB, checked to be UTF-8 text."""
    rest, offset = b"", 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            block = rest + data
            if offset == 0:
                block = block.removeprefix(b"\xef\xbb\xbf")
            end = block.rfind(b"\n") + 1 or block.rfind(b" ") + 1 or _character_boundary(block)
            chunk, rest = block[:end], block[end:]
            yield _checked(path, chunk, offset)
            offset += len(chunk)
    if rest:
        yield _checked(path, rest, offset)


def _checked(path: Path, chunk: bytes, offset: int) -> bytes:
    advice = "give UTF-8 text (`iconv -f LATIN1 -t UTF-8` converts)"
    if (zero := chunk.find(b"\0")) >= 0:
        raise ValueError(f"{path}: binary file, byte {offset + zero} is NUL; {advice}")
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        seen = offset + error.start
        raise ValueError(f"{path}: binary file or another encoding, byte {seen} is not UTF-8; {advice}") from None
    return chunk


def _character_boundary(block: bytes) -> int:
    """The end of the last whole UTF-8 character in `block`."""
    for back in range(1, min(4, len(block)) + 1):
        lead = block[-back]
        if lead & 0xC0 != 0x80:
            width = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(block) - back if width > back else len(block)
    return len(block)


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); JSONL holds one object per line") from None
            if not isinstance(record, dict) or field not in record:
                has = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else "is no object"
                raise ValueError(f"{where} has no field {field!r} (it {has}); name the field with data.field")
            if not isinstance(record[field], str):
                seen = type(record[field]).__name__
                raise ValueError(f"{where}: field {field!r} is of type {seen}, wanted a string; name another field")
            content = record[field].encode(errors="replace").replace(b"\0", b"")
            if content:
                yield Document(f"{path}:{number}", len(content), lambda content=content: iter([content]))  # type: ignore[misc]


# -- text installed with the package -----------------------------------------------------------------------------------
def builtin() -> Source:
    """English prose that needs no download: the docstrings of installed packages, split by package.

    A document is one docstring of a module, class or function, without its code examples; duplicates and those
    that are mostly code are left out. The order is that of the files.
    """
    packages = (*TRAIN_PACKAGES, *HELD_OUT_PACKAGES)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]

    @functools.cache
    def collected() -> list[Document]:
        return list(documents())

    def documents() -> Iterator[Document]:
        seen: set[bytes] = set()
        held_out_bytes = 0
        for package in packages:
            for name, text in _docstrings(package):
                content = text.encode(errors="ignore")
                digest = hashlib.blake2b(content, digest_size=16).digest()
                held_out = package in HELD_OUT_PACKAGES
                if digest not in seen and held_out_bytes + len(content) <= _HELD_OUT_BYTES:
                    seen.add(digest)
                    held_out_bytes += len(content) if held_out else 0
                    yield Document(name, len(content), lambda content=content: iter([content]), held_out)  # type: ignore[misc]

    learnt, held = ", ".join(versions[: len(TRAIN_PACKAGES)]), ", ".join(versions[len(TRAIN_PACKAGES) :])
    name = f"built-in English: docstrings of {learnt}; held out {held}"
    code = [inspect.getsource(_prose), inspect.getsource(_docstrings)]
    return Source(name, json.dumps([versions, code]), 0, lambda: iter(collected()))


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"{package}: not installed, so the built-in text is missing; install it or give a text file")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if any(part in ("tests", "test", "testing", "_vendor") or part.startswith("test_") for part in inner.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a package's own odd escapes are not our user's business
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template or a deliberately broken file
        for node in _definitions(tree):
            prose = _prose(ast.get_docstring(node) or "")
            if prose:
                yield f"{package}/{inner}:{getattr(node, 'name', '')}", prose


def _definitions(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, class or function and those inside it; far fewer nodes than `ast.walk` visits."""
    yield node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(inner)


def _prose(docstring: str) -> str:
    """The docstring without interactive examples and their output; empty if little English is left."""
    lines, example = [], False
    for line in docstring.splitlines():
        bare = line.strip()
        example = bare.startswith((">>>", "...")) or (example and bool(bare))
        if not example:
            lines.append(line.rstrip())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    text = re.sub(r"Examples?:{0,2}\n(?:[-=]{3,}\n)?\s*(?=\Z|[A-Z][\w ]*\n[-=]{3,}\n)", "", text + "\n").strip()
    words = re.findall(r"(?<![\w.(\[])[a-zA-Z][a-z]+(?![\w(\[=])", text)
    enough = len(text) >= 100 and sum(map(len, words)) >= 0.6 * len(re.sub(r"\s", "", text))
    return text + "\n" if enough else ""

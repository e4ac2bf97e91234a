"""Reading text: what is found, how it is split, and what is said about text that is none."""

import json

import numpy as np
import pytest

from tidegate.tasks.language import corpus, data

PARAGRAPHS = "\n\n".join(f"Paragraph {i} speaks of rivers, tides and gates é." for i in range(400))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TIDEGATE_CACHE", str(tmp_path_factory.mktemp("cache")))


def documents(stream):
    """The documents of a byte stream."""
    return bytes(stream).split(b"\xff")[1:-1]


def test_single_file_is_cut_at_a_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PARAGRAPHS)
    found = data.prepare(path, held_out=0.1)
    (train,), (held_out,) = documents(found.train), documents(found.held_out)
    assert train + held_out == PARAGRAPHS.encode()
    assert held_out.startswith(b"Paragraph ")
    assert abs(len(held_out) / len(PARAGRAPHS.encode()) - 0.1) < 0.01
    assert "paragraph" in found.describe()


def test_a_single_long_line_is_cut_at_a_space(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("word " * 2000 + "\n")
    found = data.prepare(path, held_out=0.1)
    (train,), (held_out,) = documents(found.train), documents(found.held_out)
    assert train + held_out == path.read_bytes()
    assert held_out.startswith(b"word ")
    assert abs(len(held_out) / 10_000 - 0.1) < 0.01


def test_documents_are_split_whole(tmp_path):
    path = tmp_path / "many.jsonl"
    texts = [f"document {i} " * (1 + i % 7) for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    found = data.prepare(path, held_out=0.2)
    train, held_out = documents(found.train), documents(found.held_out)
    assert sorted(train + held_out) == sorted(text.encode() for text in texts)
    assert abs(sum(map(len, held_out)) / sum(map(len, texts)) - 0.2) < 0.02
    assert found.summary["split"] == "by document"


def test_directory_takes_text_and_skips_binaries(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(30):
        (tmp_path / "sub" / f"{i:02}.txt").write_text(f"file {i} " * 40)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    (tmp_path / ".hidden").write_text("hidden")
    found = data.prepare(tmp_path, held_out=0.1)
    everything = documents(found.train) + documents(found.held_out)
    assert len(everything) == 30
    assert "1 binary files skipped" in found.describe()
    assert b"hidden" not in b"".join(everything)


def test_two_documents_leave_something_to_hold_out(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(PARAGRAPHS)
    found = data.prepare(tmp_path, held_out=0.05)
    assert 0.04 < len(found.held_out) / (len(found.train) + len(found.held_out)) < 0.06


def test_long_lines_and_character_boundaries(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 7)
    for text in ("é" * 50, "a" + "漢字" * 30, "no newline but spaces " * 9, "x\n\ny" * 20, "🌊" * 11):
        path = tmp_path / "text.txt"
        path.write_text(text)
        (document,) = corpus.open_source(path).documents()
        chunks = list(document.chunks())
        assert b"".join(chunks).decode() == text
        assert all(chunk.decode() for chunk in chunks)


def test_byte_order_mark_vanishes(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfhello there")
    (document,) = corpus.open_source(path).documents()
    assert b"".join(document.chunks()) == b"hello there"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty; give UTF-8 text"),
        ("binary.txt", b"text" * 300_000 + b"\0", "binary file, byte 1200000 is NUL; give UTF-8"),
        ("latin.txt", b"caf\xe9 au lait", "another encoding, byte 3 is not UTF-8; .*iconv"),
        ("field.jsonl", b'{"text": "a"}\n{"title": "b"}\n', "line 2 has no field 'text' .it has 'title'.; name"),
        ("type.jsonl", b'{"text": 5}\n', "line 1: field 'text' is of type int, wanted a string"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("blank.jsonl", b'{"text": ""}\n', "there is no text in it"),
        ("short.txt", b"a", "1 bytes are too few to hold a part out"),
    ],
)
def test_bad_text_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.prepare(path)
    assert "\n" not in str(caught.value)
    assert not list((data.cache_folder() / "corpora").glob("*")), "nothing half-written is left"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory; give a text file"):
        data.prepare(tmp_path / "nowhere.txt")


def test_empty_directory(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"no text file in this directory \(1 binary skipped\)"):
        data.prepare(tmp_path)


def test_cache_is_reused_until_the_text_changes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PARAGRAPHS)
    first, second = data.prepare(path), data.prepare(path)
    assert first.folder == second.folder
    path.write_text(PARAGRAPHS + " more")
    assert data.prepare(path).folder != first.folder
    assert data.prepare(path, held_out=0.2).folder != data.prepare(path).folder


def test_builtin_is_english_split_by_package():
    found = data.prepare()
    assert found.summary["train_bytes"] > 3_000_000
    assert 400_000 < found.summary["held_out_bytes"] <= 500_000
    text = bytes(found.train[1:200_000]).decode(errors="replace")
    words = [word.lower() for word in text.split()]
    assert sum(word in ("the", "of", "a", "is", "to", "and", "in") for word in words) / len(words) > 0.1
    assert ">>>" not in text
    held = set(documents(found.held_out))
    assert not held & set(documents(found.train))
    assert b"graph" in b" ".join(held)
    assert np.array_equal(data.prepare().train, found.train)

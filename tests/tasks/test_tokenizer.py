"""Text to ids and back, whole and one id at a time."""

import json

import numpy as np
import pytest

from tidegate.tasks.language import data
from tidegate.tasks.language.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

TEXTS = ["", "plain", "  spaces \n\n\ttabs", "naïve café 漢字 🌊", "<|document|>", "\r\n", "a" * 1000]


@pytest.fixture(scope="module")
def bpe():
    sample = [" ".join(f"the tide comes in at gate {i} and goes out" for i in range(300)), "漢字 and the gates " * 20]
    return BPETokenizer.train((text.encode() for text in sample), 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_every_text_survives(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        assert one.vocab_size == tokenizer.vocab_size
        for text in TEXTS:
            ids = one.encode(text)
            assert one.boundary not in ids, "text must not be able to end a document"
            assert one.decode(ids) == text
            assert one.decode([one.boundary, *ids, one.boundary]) == text
            assert all(0 <= i < one.vocab_size for i in ids)
            table = one.token_bytes()
            assert b"".join(table[i] for i in one.encode_chunk(text.encode())) == text.encode()


def test_stream_equals_whole(tokenizer):
    for text in TEXTS:
        stream = tokenizer.stream()
        pieces = [stream.feed(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) + stream.flush() == text
    stream = tokenizer.stream()
    assert "".join(stream.feed(i) for i in tokenizer.encode("é")[:1]) in ("", "é")


def test_half_a_character_is_flushed():
    stream = ByteTokenizer().stream()
    assert stream.feed(0xC3) == ""
    assert stream.flush() == "\ufffd"


def test_bpe_shortens_what_it_has_seen(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode("the tide ")) <= 4


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="wanted at least 257"):
        BPETokenizer.train(iter([b"x"]), 100)


def test_damaged_and_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of a training run"):
        load_tokenizer(tmp_path)
    for content in ("{", json.dumps({"model": 3}), "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="not a readable tokenizer"):
            load_tokenizer(tmp_path)


def test_bpe_corpus_holds_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDEGATE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    text = "\n\n".join(f"The tide {i} comes in — and goes." for i in range(500))
    path.write_text(text)
    found = data.prepare(path, tokenizer="bpe", vocab_size=400)
    assert found.train.dtype == np.uint16
    assert found.tokenizer.decode([*found.train.tolist(), *found.held_out.tolist()]) == text
    again = data.prepare(path, tokenizer=found.tokenizer, held_out=1.0)
    assert again.tokenizer.decode(again.held_out.tolist()) == text

"""The score against its definition, read one document and one token at a time."""

import math

import numpy as np
import pytest
import torch

from tidegate import Segments
from tidegate.models.language import LanguageModel
from tidegate.tasks.language.metrics import Score, byte_stream, evaluate, growing_state, shortened
from tidegate.tasks.language.tokenizer import BPETokenizer, ByteTokenizer

DOCUMENTS = [b"the tide", b"a", b"gates of the sea " * 9, b"tide and time wait for none", b"x" * 33]
STREAM = np.frombuffer(b"\xff" + b"".join(d + b"\xff" for d in DOCUMENTS), np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(256, 16, [("gla", {"num_heads": 2})] * 2)


def literal(model, documents) -> Score:
    """Each document alone, in one piece."""
    nats, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([[255, *document]])
        with torch.no_grad():
            logits, _ = model(ids, segments=Segments.packed([[ids.shape[1]]]))
        targets = torch.tensor([*document, 255])
        nats += float(torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum"))
        tokens += len(targets)
    return Score(nats, tokens, sum(map(len, documents)))


@pytest.mark.parametrize(("rows", "length"), [(1, 1000), (1, 7), (2, 16), (3, 1), (16, 64)])
def test_rows_and_windows_do_not_matter(model, rows, length):
    score = evaluate(model, STREAM, ByteTokenizer(), rows=rows, length=length)
    wanted = literal(model, DOCUMENTS)
    assert (score.tokens, score.bytes) == (wanted.tokens, wanted.bytes)
    assert score.nats == pytest.approx(wanted.nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(wanted.nats / math.log(2) / sum(map(len, DOCUMENTS)), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(wanted.nats / wanted.tokens), rel=1e-5)


def test_parts_add_up(model):
    whole = evaluate(model, STREAM, ByteTokenizer(), rows=2, length=16)
    parts = [evaluate(model, STREAM, ByteTokenizer(), rows=2, length=16, part=(i, 3)) for i in range(3)]
    total = parts[0] + parts[1] + parts[2]
    assert (total.tokens, total.bytes) == (whole.tokens, whole.bytes)
    assert total.nats == pytest.approx(whole.nats, rel=1e-5)


def test_training_mode_is_restored(model):
    model.train()
    evaluate(model, STREAM, ByteTokenizer())
    assert model.training


def test_attention_is_read_in_windows_of_constant_memory():
    attention = LanguageModel(256, 16, [("attention", {"num_heads": 2})])
    assert growing_state(attention)
    one, two = (evaluate(attention, STREAM, ByteTokenizer(), rows=1, length=n) for n in (1000, 20))
    assert one.tokens == two.tokens
    assert two.nats == pytest.approx(one.nats, rel=0.1)


def test_recurrent_models_do_not_grow(model):
    assert not growing_state(model)


def test_shortened_keeps_whole_documents():
    assert bytes(shortened(STREAM, 15, 255)) == b"\xffthe tide\xffa\xff"
    assert len(shortened(STREAM, None, 255)) == len(shortened(STREAM, 10_000, 255)) == len(STREAM)
    assert len(shortened(STREAM, 120, 255)) == 120, "a document too long to fit is cut"


def test_byte_stream_of_bpe_is_the_text():
    bpe = BPETokenizer.train(iter([b"the tide and the gates " * 50]), 270)
    ids = [bpe.boundary]
    for document in DOCUMENTS:
        ids += [*bpe.encode(document.decode()), bpe.boundary]
    stream = np.array(ids, np.uint16)
    assert bytes(byte_stream(stream, bpe)) == bytes(STREAM)
    assert bytes(byte_stream(stream, bpe, limit=10)) == bytes(STREAM)[:10]
    assert byte_stream(STREAM, ByteTokenizer()) is not None

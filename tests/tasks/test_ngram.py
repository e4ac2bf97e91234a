"""The n-gram yardstick against its definition written as loops, and as a probability."""

import math
import random
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from tidegate.tasks.language.ngram import NGram


def stream_of(*documents: bytes) -> np.ndarray:
    return np.frombuffer(b"\xff" + b"".join(document + b"\xff" for document in documents), np.uint8)


def literal_bits(train: list[bytes], test: list[bytes], order: int) -> float:
    """Interpolated Kneser-Ney over dictionaries, one symbol at a time."""

    def events(documents):
        for document in documents:
            history = [255] * order
            for symbol in [*document, 255]:
                yield tuple(history), symbol
                history = [*history, symbol][-order:] if order else []

    counts = [Counter() for _ in range(order + 1)]
    counts[order] = Counter((*context, symbol) for context, symbol in events(train))
    for k in range(order - 1, -1, -1):
        counts[k] = Counter(entry[1:] for entry in counts[k + 1])
    discounts, totals, distinct = [], [], []
    for level in counts:
        once, twice = (sum(n == wanted for n in level.values()) for wanted in (1, 2))
        discounts.append(once / (once + 2 * twice) if once and twice else 0.5)
        total, kinds = defaultdict(int), defaultdict(int)
        for entry, n in level.items():
            total[entry[:-1]] += n
            kinds[entry[:-1]] += 1
        totals.append(total)
        distinct.append(kinds)
    bits = 0.0
    for context, symbol in events(test):
        p = 1 / 256
        for k in range(order + 1):
            c = context[order - k :]
            if not totals[k][c]:
                break
            n, total = counts[k][(*c, symbol)], totals[k][c]
            p = max(n - discounts[k], 0) / total + discounts[k] * distinct[k][c] / total * p
        bits -= math.log2(p)
    return bits / sum(map(len, test))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_the_definition(order):
    rng = random.Random(5)
    words = [b"tide ", b"gate ", b"the ", b"a ", b"sea. "]
    documents = [b"".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(40)]
    train, test = documents[:30], [*documents[30:], b"unseen zebra"]
    ours = NGram.fit(stream_of(*train), order).bits_per_byte(stream_of(*test))
    assert ours == pytest.approx(literal_bits(train, test, order), abs=1e-9)


def test_sums_to_one_after_any_context():
    model = NGram.fit(stream_of(b"the tide comes in", b"the gate goes out"), 3)
    for context in (b"the", b"\xff\xff\xff", b"zzz", b"tid", b"out"):
        keys = int.from_bytes(context, "big") * 256 + np.arange(256)
        assert model.probability(keys).sum() == pytest.approx(1, abs=1e-12)


def test_nothing_is_carried_across_documents():
    model = NGram.fit(stream_of(b"abc" * 20, b"xyz" * 20), 3)
    together = stream_of(b"abcabc", b"xyzxyz")
    bits = sum(model.bits_per_byte(stream_of(part)) * 6 for part in (b"abcabc", b"xyzxyz"))
    assert model.bits_per_byte(together) * 12 == pytest.approx(bits, abs=1e-9)


def test_chunks_do_not_matter(monkeypatch):
    import tidegate.tasks.language.ngram as module

    text = stream_of(*(b"tide and gate %d" % i for i in range(50)))
    whole = NGram.fit(text, 3).bits_per_byte(text)
    monkeypatch.setattr(module, "_CHUNK", 37)
    assert NGram.fit(text, 3).bits_per_byte(text) == pytest.approx(whole, abs=1e-9)


def test_five_megabytes_in_seconds():
    rng = np.random.default_rng(0)
    text = rng.choice(np.frombuffer(b"etaoin shrdlu", np.uint8), 5_000_000)
    begin = time.perf_counter()
    model = NGram.fit(np.concatenate([[np.uint8(255)], text, [np.uint8(255)]]), 3)
    assert time.perf_counter() - begin < 10
    assert model.bits_per_byte(stream_of(bytes(text[:1000]))) == pytest.approx(math.log2(12), abs=0.3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="order: seen 9"):
        NGram.fit(stream_of(b"abc"), 9)
    with pytest.raises(ValueError, match="no text"):
        NGram.fit(np.zeros(0, np.uint8))

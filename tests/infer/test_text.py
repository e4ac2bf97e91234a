"""Text generation and the command: complete characters, stop texts, turns that remember."""

from __future__ import annotations

import io

import pytest
import torch

from tidegate import LanguageModel
from tidegate.cli.generate import generate
from tidegate.infer.generate import Generation
from tidegate.infer.text import TextGeneration
from tidegate.tasks.language.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(256, 32, "sliding-window-attention,attention").eval()


def scripted(monkeypatch, answer: bytes):
    """Let the model say `answer`, then the boundary."""

    def tokens(self):
        for byte in [*answer, 255]:
            yield torch.tensor([byte])

    monkeypatch.setattr(Generation, "__next__", lambda self: next(self.__dict__.setdefault("script", tokens(self))))


def test_characters_come_whole(model, monkeypatch):
    scripted(monkeypatch, "naïve €5".encode())
    pieces = list(TextGeneration(model, ByteTokenizer(), "x"))
    assert pieces == ["n", "a", "ï", "v", "e", " ", "€", "5"]


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        (b"one two three", ["two"], "one "),
        (b"one two three", ["three", "wo"], "one t"),
        (b"one tw", ["two"], "one tw"),
        (b"aab", ["ab"], "a"),
        (b"half \xe2\x82", [], "half �"),
        (b"", ["x"], ""),
    ],
)
def test_stop_texts(model, monkeypatch, answer, stop, text):
    scripted(monkeypatch, answer)
    pieces = list(TextGeneration(model, ByteTokenizer(), "x", stop=stop))
    assert "".join(pieces) == text
    assert all(pieces)


def test_the_command_streams_prompt_and_continuation(model, tmp_path, capsys):
    model.save(tmp_path)
    ByteTokenizer().save(tmp_path)
    for _ in range(2):
        generate(tmp_path, prompt="It was", max_tokens=20, seed=3, top_k=50)
    first, second = capsys.readouterr().out.encode(errors="replace").split(b"It was")[1:]
    assert first == second
    assert first.endswith(b"\n")
    assert len(first) > 5


def test_interactive_turns_remember(model, tmp_path, capsys, monkeypatch):
    model.save(tmp_path)
    ByteTokenizer().save(tmp_path)
    options = dict(max_tokens=6, temperature=0.0, interactive=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\nc\n\nnot read\n"))
    generate(tmp_path, **options)
    together = capsys.readouterr().out
    tokenizer = ByteTokenizer()
    first = TextGeneration(model, tokenizer, "a b\n", 6, temperature=0)
    said = "".join(first)
    second = "".join(TextGeneration(model, tokenizer, "c\n", 6, temperature=0, state=first.state))
    assert together == f"{said}\n{second}\n"


def test_user_errors_are_one_line(model, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        generate(tmp_path / "none")
    model.save(tmp_path)
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        generate(tmp_path)
    LanguageModel(20, 32, "attention").save(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="not a pair"):
        generate(tmp_path)
    with pytest.raises(ValueError, match="top_p"):
        generate(tmp_path, top_p=2.0)

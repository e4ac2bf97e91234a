"""Text in, text out, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tidegate.infer.generate import Generation
from tidegate.models.language import LanguageModel
from tidegate.state import State
from tidegate.tasks.language.tokenizer import Tokenizer


class TextGeneration(Iterator[str]):
    """The continuation of a text, as pieces of text that are complete characters; `state` is where it stands.

    A new text begins with the tokenizer's boundary, as documents do in training; with a `state` the prompt goes on from
    there instead. Generation ends after `max_new_tokens`, at a boundary, or where one of the texts in `stop` would
    appear, which is not part of the output. Further options are those of `model.generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        state: State | None = None,
        **options: Any,
    ) -> None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens, the model {model.vocab_size}; they are not a pair"
            )
        if any(not text for text in stop):
            raise ValueError("stop: an empty text would stop at once; leave the option out")
        ids = tokenizer.encode(prompt)
        if state is None:
            ids = [tokenizer.boundary, *ids]
        self._generation = Generation(model, ids, max_new_tokens, stop=tokenizer.boundary, state=state, **options)
        self._decoder = tokenizer.stream()
        self._boundary, self._stop = tokenizer.boundary, tuple(stop)
        self._held = ""  # the beginning of a stop text, perhaps
        self._done = False

    def __next__(self) -> str:
        while not self._done:
            token = next(self._generation, None)
            if token is None or int(token) == self._boundary:
                self._done = True
                self._held += self._decoder.flush()
            else:
                self._held += self._decoder.feed(int(token))
            if piece := self._release():
                return piece
        raise StopIteration

    @property
    def state(self) -> State:
        """The state after the prompt and all tokens generated so far."""
        return self._generation.state

    def _release(self) -> str:
        """What may be shown: everything up to a stop text, or up to what may still become one."""
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self._done = True
            keep = min(found)
        elif self._done:
            keep = len(self._held)
        else:
            keep = len(self._held) - max((_overlap(self._held, text) for text in self._stop), default=0)
        piece, self._held = self._held[:keep], self._held[keep:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`.

    >>> _overlap("one tw", "two")
    2
    """
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)

"""Calls of recurrences, for those who want to see them: what `tidegate.methods.explain` listens to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Call:
    """One call of a recurrence: the op's name, and what it was given, by name and with defaults."""

    op: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def run(self) -> Any:
        """What the op returns."""
        return self.function(**self.arguments)


_answer: Callable[[Call], Any] | None = None


@contextmanager
def answered_by(answer: Callable[[Call], Any]) -> Iterator[None]:
    """Inside the block, every call of a recurrence returns `answer(call)`; `call.run()` is what it would have returned.

    Ops that an op calls itself are not seen. As with `tidegate.backend`, the block holds for the whole process.

    >>> import torch
    >>> from tidegate import ops
    >>> seen = []
    >>> with answered_by(lambda call: seen.append(call.op) or call.run()):
    ...     h, state = ops.scan(torch.tensor([0.5]), torch.ones(1, 3, 1))
    >>> seen, h.flatten().tolist()
    (['scan'], [1.0, 1.5, 1.75])
    """
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def recurrence(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """Decorator of a public op that mixes tokens and returns `(outputs, state, ...)`: its calls can be seen.

    They are called by the function's name, or by `name`.
    """

    @functools.wraps(function)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if _answer is None:
            return function(*args, **kwargs)
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        return _answered(Call(name or function.__name__, function, given.arguments))

    return op


def _answered(call: Call) -> Any:
    global _answer
    answer, _answer = _answer, None  # what happens inside the answer is not seen
    try:
        return answer(call)  # type: ignore[misc]
    finally:
        _answer = answer

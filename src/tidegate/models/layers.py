"""Which mixer stands in which layer: names, options, and a compact pattern for hybrids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tidegate import registry

Layer = tuple[str, dict[str, Any]]
Layers = str | Sequence[Any]

_TOKEN = re.compile(r"\s*(?:(x\s*\d+)(?![\w-])|(\d+)(?![\w-])|([A-Za-z][\w-]*)|([*,()]))")
_GRAMMAR = "wanted something like 'gla', '4*gla', '3*gated-deltanet,1*attention' or '(3*gla,attention) x 2'"


def parse(layers: Layers) -> list[Layer]:
    """The layers of a model, one (name, options) each.

    `layers` is a pattern or a list whose entries are patterns or (pattern, options) pairs. A pattern lists mixers with
    optional counts, `3*gated-deltanet,1*attention`; `x 2` at its end repeats the whole; parentheses group.
    Raises ValueError for an unknown mixer or option (naming the closest), a count below 1, or a pattern that does not
    read.

    >>> [name for name, _ in parse("2*lstm,attention x 2")]
    ['lstm', 'lstm', 'attention', 'lstm', 'lstm', 'attention']
    >>> parse(["lstm", ("attention", {"num_heads": 2})])
    [('lstm', {}), ('attention', {'num_heads': 2})]
    """
    found: list[Layer] = []
    for entry in [layers] if isinstance(layers, str) else layers:
        pattern, options = (entry, {}) if isinstance(entry, str) else _pair(entry)
        for name in expand(pattern):
            registry.check_options(name, options)
            if reserved := {"dim", "device", "dtype"} & set(options):
                raise ValueError(f"layers: {name} takes {sorted(reserved)[0]!r} from the model, not from its options")
            found.append((name, dict(options)))
    if not found:
        raise ValueError("layers: the list is empty; a model needs at least one layer")
    return found


def expand(pattern: str) -> list[str]:
    """The names a pattern stands for, each known to the registry."""
    tokens, end = [], 0
    while pattern[end:].strip():
        match = _TOKEN.match(pattern, end)
        if match is None:
            raise ValueError(f"layers: cannot read {pattern[end:].strip()!r} in {pattern!r}; {_GRAMMAR}")
        tokens.append(match)
        end = match.end()
    reader = _Reader(pattern, [(m.lastindex or 0, m[m.lastindex or 0]) for m in tokens])
    names = reader.items()
    if reader.kind is not None:
        raise reader.error()
    return names


_REPEAT, _NUMBER, _NAME, _SIGN = 1, 2, 3, 4


class _Reader:
    """Recursive descent: items = item {"," item} ["x" count]; item = [count "*"] (name | "(" items ")")."""

    def __init__(self, pattern: str, tokens: list[tuple[int, str]]) -> None:
        self.pattern, self.tokens, self.at = pattern, tokens, 0

    @property
    def kind(self) -> int | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self, sign: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at] == (_SIGN, sign):
            self.at += 1
            return True
        return False

    def items(self) -> list[str]:
        names = self.item()
        while self.take(","):
            names += self.item()
        return names * self.count(_REPEAT)

    def item(self) -> list[str]:
        times = self.count(_NUMBER)
        if self.at and self.tokens[self.at - 1][0] == _NUMBER and not self.take("*"):
            raise self.error()
        if self.take("("):
            names = self.items()
            if not self.take(")"):
                raise ValueError(f"layers: a ')' is missing in {self.pattern!r}; {_GRAMMAR}")
            return names * times * self.count(_REPEAT)
        if self.kind != _NAME:
            raise self.error()
        name = self.tokens[self.at][1]
        registry.info(name)
        self.at += 1
        return [name] * times

    def count(self, kind: int) -> int:
        if self.kind != kind:
            return 1
        count = int(self.tokens[self.at][1].lstrip("x "))
        if count < 1:
            raise ValueError(f"layers: the count {count} in {self.pattern!r} must be at least 1")
        self.at += 1
        return count

    def error(self) -> ValueError:
        seen = repr(self.tokens[self.at][1]) if self.kind is not None else "the end"
        return ValueError(f"layers: seen {seen} where it makes no sense in {self.pattern!r}; {_GRAMMAR}")


def _pair(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, Sequence) and len(entry) == 2:
        name, options = entry
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, options
    raise ValueError(f"layers: seen {entry!r}, wanted a mixer's name or a pair like ('gla', {{'num_heads': 2}})")

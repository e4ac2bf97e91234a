"""What the commands print with: one console, one table style, numbers a person can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """A console on standard output; a pipe or file gets wide lines, so that tables are not folded."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = max(out.width, 200)
    return out


def table(columns: Sequence[str], *, title: str = "") -> Table:
    """An empty table; a column whose name begins with `>` is aligned right."""
    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return made


def print_json(value: Any) -> None:
    """Write `value` as JSON and nothing else."""
    print(json.dumps(value, indent=2, default=str))


def count(number: float) -> str:
    """A count in short.

    >>> count(950), count(66_048), count(2.5e9)
    ('950', '66.0 k', '2.50 G')
    """
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{three_digits(number / factor)} {suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """A size in bytes, in short.

    >>> size(512), size(16_384), size(3 << 20)
    ('512 B', '16.0 KiB', '3.00 MiB')
    """
    for factor, suffix in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= factor:
            return f"{three_digits(number / factor)} {suffix}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """A time in short.

    >>> duration(2.5e-7), duration(0.0123), duration(3.21)
    ('250 ns', '12.3 ms', '3.21 s')
    """
    for factor, suffix in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{three_digits(seconds / factor)} {suffix}"
    return f"{three_digits(seconds / 1e-9)} ns"


def three_digits(number: float) -> str:
    """Three significant digits, without an exponent.

    >>> three_digits(1.2345), three_digits(34.56), three_digits(345.6)
    ('1.23', '34.6', '346')
    """
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"

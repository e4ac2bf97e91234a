"""Griffe extension of the documentation build: docstrings as they are written in the source, as Markdown.

A docstring here ends a paragraph before an indented block with `::` and holds doctests bare. Markdown has neither: the
double colon becomes a single one, and a doctest becomes a fenced block.
"""

from __future__ import annotations

from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites every docstring once it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring with fences around doctests, and single colons.

    >>> print(markdown("Equation::\\n\\n    y = x\\n\\n>>> 1 + 1\\n2\\n\\nEnd."))
    Equation:
    <BLANKLINE>
        y = x
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    End.
    """
    lines: list[str] = []
    example = False
    for line in docstring.splitlines():
        if line.startswith(">>>") and not example:
            lines.append("```pycon")
            example = True
        elif example and not line.strip():
            lines.append("```")
            example = False
        if not example and line.rstrip().endswith("::"):
            line = line.rstrip()[:-1] if line.strip() != "::" else ""
        lines.append(line)
    return "\n".join([*lines, "```"] if example else lines)

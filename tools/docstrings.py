"""Griffe extension of the documentation build: docstrings as they are written in the source, as Markdown.

A docstring here ends a paragraph before an indented block with `::` and holds doctests bare. Markdown has neither: the
double colon becomes a single one, a doctest becomes a fenced block, and a bare `*` is a product, never emphasis.
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
    """The docstring with fences around doctests, single colons, and products that stay products.

    >>> markdown("a * b, `a * b`")
    'a \\\\* b, `a * b`'
    >>> markdown("y::\\n\\n    y = x\\n\\n>>> 1 + 1\\n2\\n\\nEnd.")
    'y:\\n\\n    y = x\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n\\nEnd.'
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
        if not example and not line.startswith("    "):
            line = "`".join(_plain(part) if n % 2 == 0 else part for n, part in enumerate(line.split("`")))
        lines.append(line)
    return "\n".join([*lines, "```"] if example else lines)


def _plain(text: str) -> str:
    return text.replace("*", "\\*")

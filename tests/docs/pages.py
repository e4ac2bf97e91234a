"""Runs the examples of a Markdown page, in order, in one namespace and one temporary folder.

- A `python` block is executed; one with `title="file.py"` is written to that file, for later blocks to import.
- A block of another language with `title="file"` is written to that file.
- A `console` block after the line `<!-- run -->` has each of its `$ tidegate ...` commands run.
- A block after `<!-- output -->` is what the block before it has to print; `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tidegate import registry

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, what it holds, and the marker on the line before it."""

    page: Path
    line: int
    language: str
    title: str
    marker: str
    code: str


def pages() -> list[Path]:
    """README.md and every page under docs/ that this harness looks after."""
    written = sorted((ROOT / "docs").rglob("*.md"))
    written = [page for page in written if not page.is_relative_to(ROOT / "docs" / "papers")]  # reports, generated
    return [ROOT / "README.md", *written]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2].strip()
        marker = re.fullmatch(r"<!-- *(\w+) *-->", above)
        title = re.search(r'title="([^"]+)"', match["rest"])
        code = textwrap.dedent(match["code"])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], title[1] if title else "", marker[1] if marker else "", code))
    return found


def run(page: Path, folder: Path, before_leaving: Callable[[dict[str, Any]], None] = lambda namespace: None) -> None:
    """Run a page's examples inside `folder`; `before_leaving` sees the namespace while what was registered is known."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    with _visitor(folder):
        for block in blocks(page):
            if block.marker == "output":
                wanted = block.code
                assert doctest.OutputChecker().check_output(wanted, printed, FLAGS), (
                    f"{page.name}:{block.line}: printed\n{printed}\ninstead of\n{wanted}"
                )
            elif block.title:
                target = folder / block.title
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                printed = _execute(block, namespace)
            elif block.language == "console" and block.marker == "run":
                printed = "".join(command(line, f"{page.name}:{block.line}") for line in commands(block))
        before_leaving(namespace)


def commands(block: Block) -> list[str]:
    """The lines after `$ ` of a console block, continued lines joined."""
    joined = block.code.replace("\\\n", " ")
    return [line[2:].partition("  #")[0].strip() for line in joined.splitlines() if line.startswith("$ ")]


def command(line: str, where: str) -> str:
    """Run one `tidegate ...` command in this process; what it printed."""
    from tidegate.cli.main import app

    program, *arguments = shlex.split(line)
    assert program == "tidegate", f"{where}: only tidegate can be run here, seen {line!r}"
    result = CliRunner().invoke(app, arguments)
    failed = f"{where}: {line!r} ended with {result.exit_code}\n{result.output}\n{result.exception!r}"
    assert result.exit_code == 0, failed
    return result.stdout


def _execute(block: Block, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    # Blank lines in front, so that a traceback shows the page's own line numbers.
    source = "\n" * block.line + block.code
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec"), namespace)
    return printed.getvalue()


@contextlib.contextmanager
def _visitor(folder: Path) -> Iterator[None]:
    """Examples may write files, import them and register mixers; nothing of it stays."""
    registry.names()  # what is discovered is to stay
    mixers, modules = dict(registry._mixers), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path.remove(str(folder))
        registry._mixers.clear()
        registry._mixers.update(mixers)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
                del sys.modules[name]

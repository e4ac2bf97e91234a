"""The `tidegate` command: finds the sub-command, and turns every foreseeable error into one clear line.

A command `name` is a function in `tidegate/cli/<name>.py`, whose signature is its options and whose docstring is its
help. Only the command that runs is imported: `tidegate --help` answers before PyTorch would have loaded.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tidegate.memory import keep_freed_memory

# command -> the function in tidegate.cli.<command>
COMMANDS = {
    "train": "train",
    "generate": "generate",
    "evaluate": "evaluate",
    "explain": "explain",
    "list": "list_mixers",
    "show": "show",
    "doctor": "doctor",
    "bench": "bench",
    "reproduce": "reproduce",
}

FIXES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "choose a place you may read and write",
    errno.EPERM: "choose a place you may read and write",
    errno.EROFS: "choose a place you may write",
    errno.ENOSPC: "free some space or write to another disk; files that were there before are intact",
    errno.EDQUOT: "free some space or write to another disk; files that were there before are intact",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a folder, not a file",
    errno.EEXIST: "choose another name or remove it first",
}


class Commands(TyperGroup):
    """The group of all commands; each is a stub until it is the one to run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=_summary(name)) for name in COMMANDS}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The real command in place of its stub."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, (_load(name) if name in COMMANDS else stub), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one line on stderr and exit code 1, with `--debug` a traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone must be noticed here, not at interpreter exit
            return result
        except BrokenPipeError:
            with contextlib.suppress(OSError):  # nothing more can be written, also not by the interpreter's last flush
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + 13) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            _fail("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            message = explain(error)
            if message is None or ctx.params["debug"]:
                raise
            _fail(message)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from tidegate import __version__

        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


@app.callback()
def tidegate(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train, stream and examine recurrent sequence models on an ordinary CPU."""
    keep_freed_memory()


def main() -> None:
    """Entry point of the `tidegate` script."""
    try:
        app(prog_name="tidegate")
    except KeyboardInterrupt:  # before a command had begun
        _fail("interrupted")
        sys.exit(130)


def explain(error: Exception) -> str | None:
    """One line with the cause and the fix, or None for an error that only a bug can cause.

    >>> explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "moby.txt"))
    'moby.txt: no such file or directory; check the path'
    >>> explain(TypeError("unsupported operand")) is None
    True
    """
    if isinstance(error, OSError) and error.strerror:
        cause = error.strerror[0].lower() + error.strerror[1:]
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{cause}; {FIXES.get(error.errno or 0, 'check the path and its permissions')}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "not enough memory; make the batch, the length or the model smaller"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python module {error.name!r} is missing; install it, or tidegate again with all it needs"
    if not isinstance(error, ValueError | OSError | ArithmeticError):
        return None
    if problems := getattr(error, "errors", None):  # of pydantic
        text = "; ".join(_problem(problem) for problem in problems())
        return f"{getattr(error, 'title', 'input')}: {text}"
    return " ".join(str(error).split()) or type(error).__name__


def _problem(problem: dict[str, Any]) -> str:
    """One entry of a pydantic error: where, what is wrong, what was seen."""
    place = ".".join(str(part) for part in problem["loc"])
    message = " ".join(str(problem["msg"]).removeprefix("Value error, ").split())
    seen = repr(problem.get("input"))
    own = problem.get("type") == "value_error"  # written by us; it says what was seen itself
    return f"{place}: {message}" + ("" if own or len(seen) > 80 else f" (seen {seen})")


def _fail(message: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)


def _load(name: str) -> TyperCommand:
    module = importlib.import_module(f"tidegate.cli.{name}")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(module, COMMANDS[name]))
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


def _summary(name: str) -> str:
    """First line of the command's docstring, read without importing its module."""
    try:
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == COMMANDS[name]:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""

"""`tidegate generate`: a trained model continues a text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tidegate.state import State


def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens (per turn).")] = 256,
    temperature: Annotated[float, typer.Option(help="Below 1 more predictable; 0 takes the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that together reach p.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Read turns from standard input.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Prepare a second, then write several times faster.")
    ] = False,
) -> None:
    """Continue a text with a trained model, streaming; `--interactive` remembers earlier turns.

    The prompt is printed before its continuation. In an interactive session each line is a turn; an empty line or the
    end of the input ends it. The model keeps its state in between, so a turn costs what it adds, not what came before.
    """
    import torch

    from tidegate.infer.sampling import check_sampling, row_seeds
    from tidegate.infer.step import Unsupported, compile_step
    from tidegate.infer.text import TextGeneration
    from tidegate.models.language import LanguageModel
    from tidegate.tasks.language.tokenizer import load_tokenizer

    check_sampling(temperature, top_k, top_p)
    model, tokenizer = LanguageModel.load(run), load_tokenizer(run)
    try:
        step = compile_step(model) if compiled else False
    except Unsupported as error:
        raise ValueError(f"--compiled: this model has no compiled step ({error}); leave the option out") from None
    seed = torch.seed() % 2**62 if seed is None else seed
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop

    def turn(text: str, number: int, state: State | None) -> TextGeneration:
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "compiled": step}
        seeds = row_seeds(seed, number + 1)[number:]
        return TextGeneration(model, tokenizer, text, max_tokens, stop=stop or (), state=state, seed=seeds, **options)

    if not interactive:
        _show([prompt])
        _show(turn(prompt, 0, None))
        _show(["\n"])
        return
    state: State | None = None
    for number, line in enumerate(_turns(prompt)):
        answer = turn(line, number, state)
        _show(answer)
        _show(["\n"])
        state = answer.state


def _turns(first: str) -> Iterator[str]:
    """The prompt, if there is one, then lines of standard input, each with its line break, until an empty one."""
    if first:
        yield first
    while True:
        if sys.stdin.isatty():
            _show(["> "])
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line if line.endswith("\n") else line + "\n"


def _show(pieces: Iterable[str]) -> None:
    """Write and flush, piece by piece. What could command a terminal is not sent to one."""
    plain = not sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(piece if plain else "".join(c for c in piece if c.isprintable() or c in "\n\t"))
        sys.stdout.flush()

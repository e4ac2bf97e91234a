"""`tidegate explain`: what every layer of a trained model looks at, as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

if TYPE_CHECKING:
    from torch import nn

    from tidegate.methods.explain import System
    from tidegate.methods.explain.picture import View
    from tidegate.tasks.language.tokenizer import Tokenizer

LONGEST = 512  # tokens: matrices grow with their square


def explain(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    text: Annotated[str, typer.Option(help="The text to read.")],
    layer: Annotated[
        list[int] | None, typer.Option(help="Only this layer, counted from 0; may be given several times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The picture [default: RUN/explain.png].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw what the layers of a trained model do with a text, one page for all of them.

    A row for each linear recurrence: its hidden attention map, the eigenvalues of its transitions beside the unit
    circle, and how fast its heads forget. Cells such as LSTM have no such matrices and are left out.
    """
    import torch

    from tidegate.cli import output
    from tidegate.methods.explain import explain as look
    from tidegate.methods.explain.picture import View, picture
    from tidegate.models.language import LanguageModel
    from tidegate.state import write_atomically
    from tidegate.tasks.language.tokenizer import load_tokenizer

    model, tokenizer = LanguageModel.load(run), load_tokenizer(run)
    names = [name for name, _ in model.layers]
    wanted = range(len(names)) if layer is None else layer
    if unknown := [index for index in wanted if not 0 <= index < len(names)]:
        raise ValueError(f"--layer: seen {unknown[0]}, wanted 0 to {len(names) - 1}: the model has {len(names)} layers")
    ids, tokens = _read(text, tokenizer)
    seen = look(model, torch.tensor([ids]))
    shown = [(_index(system), system) for system in seen.systems if _index(system) in wanted]
    if not shown:
        raise ValueError(f"--layer: {_names(names, wanted)} has no linear recurrence, so there is no matrix to show")

    path = out or run / "explain.png"
    titles = [f"layer {index}  {_title(system, names[index], model)}" for index, system in shown]
    views = [View.of(system) for _, system in shown]
    write_atomically(path, picture(views, titles, tokens))
    rows = [_numbers(index, names[index], view) for (index, _), view in zip(shown, views, strict=True)]
    if as_json:
        output.print_json({"picture": str(path), "tokens": tokens, "recurrences": rows})
        return
    table = output.table(["layer", "mixer", "recurrence", ">heads", ">memory (tokens)", ">time constant"])
    for row in rows:
        memory, constant = _range(row["memory_length"]), _range(row["time_constant"])
        table.add_row(str(row["layer"]), row["mixer"], row["recurrence"], str(row["heads"]), memory, constant)
    console = output.console()
    console.print(table)
    if silent := [index for index in wanted if index not in {index for index, _ in shown}]:
        console.print(f"without linear recurrence, not drawn: {_names(names, silent)}")
    console.print(Text(str(path)), soft_wrap=True)


def _read(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """Token numbers and their texts, after the boundary that stands before every document."""
    if not text:
        raise ValueError("--text: it is empty, wanted a text to read")
    ids = [tokenizer.boundary, *tokenizer.encode(text)]
    if len(ids) > LONGEST:
        raise ValueError(f"--text: it has {len(ids)} tokens, wanted at most {LONGEST}; give less of it")
    table = tokenizer.token_bytes()
    return ids, ["⊢", *(table[token].decode(errors="replace") for token in ids[1:])]


def _index(system: System) -> int:
    return int(system.layer.split(".")[1])  # "blocks.3.mixer"


def _title(system: System, mixer: str, model: nn.Module) -> str:
    """`gla`, and the part of the mixer where it is not the mixer itself that called."""
    part = system.layer.partition(".mixer.")[2]
    return f"{mixer} {part}".rstrip() + (f"  ({system.op.replace('_', ' ')})" if part else "")


def _names(names: list[str], indices: Any) -> str:
    return ", ".join(f"layer {index} ({names[index]})" for index in indices)


def _numbers(index: int, mixer: str, view: View) -> dict[str, Any]:
    return {
        "layer": index,
        "mixer": mixer,
        "recurrence": view.system.op,
        "heads": view.count,
        "shown_heads": view.heads,
        "memory_length": _finite(view.system.memory_length[0].tolist()),
        "time_constant": _finite(view.system.time_constant[0].tolist()),
    }


def _finite(numbers: list[float]) -> list[float | None]:
    """For JSON, which has neither infinity nor NaN."""
    return [number if math.isfinite(number) else None for number in numbers]


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{min(known):.1f}" + (f" to {max(known):.1f}" if len(values) > 1 else "")

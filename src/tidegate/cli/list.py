"""`tidegate list`: every architecture and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from tidegate.cli import output


def list_mixers(
    family: Annotated[str | None, typer.Option(help="Only this family, such as delta.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="The width at which costs are counted.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all mixers: family, paper, parameters, state, cost per token, contract exceptions.

    Costs are counted for one layer, one sequence, float32. A state that grows is given per token it has seen, and its
    cost grows with every token cached.
    """
    from tidegate import registry

    if family is not None and family not in registry.FAMILIES:
        near = registry.did_you_mean(family, registry.FAMILIES)
        raise ValueError(f"--family: there is no {family!r}{near}; known are {', '.join(registry.FAMILIES)}")
    infos = [registry.info(name) for name in registry.names()]
    rows = [_row(info, dim) for info in infos if family in (None, info.family)]
    if as_json:
        output.print_json(rows)
        return
    columns = ("name", "family", "paper", ">parameters", ">state", ">flops per token", "contract exceptions")
    table = output.table(columns, title=f"{len(rows)} mixers, one layer at dim {dim}")
    for row in rows:
        paper = f"{row['paper']} (arXiv {row['arxiv']})" if row["arxiv"] else row["paper"]
        exceptions = "; ".join(f"{name}: {reason}" for name, reason in row["exceptions"].items())
        parameters = output.count(row["parameters"])
        table.add_row(row["name"], row["family"], paper, parameters, _state(row), _flops(row), exceptions or "none")
    console = output.console()
    console.print(table)
    console.print("`tidegate show NAME` explains one of them.")


def _row(info: Any, dim: int) -> dict[str, Any]:
    from tidegate.bench import mixers

    try:
        cost = mixers.cost(info.name, dim)
    except ValueError as error:
        raise ValueError(f"--dim {dim}: {info.name} cannot have that width ({error}); try 64 or 256") from None
    return {
        "name": info.name,
        "family": info.family,
        "paper": info.paper,
        "title": info.title,
        "arxiv": info.arxiv,
        **dataclasses.asdict(cost),
        "exceptions": dict(info.exceptions),
    }


def _state(row: dict[str, Any]) -> str:
    if row["state_bytes_per_token"]:
        return f"grows, {output.size(row['state_bytes_per_token'])} per token"
    return output.size(row["state_bytes"])


def _flops(row: dict[str, Any]) -> str:
    if row["flops_per_cached_token"]:
        return f"{output.count(row['flops_per_token'])} + {output.count(row['flops_per_cached_token'])} per cached"
    return output.count(row["flops_per_token"])

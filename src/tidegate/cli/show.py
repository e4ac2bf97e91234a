"""`tidegate show`: one architecture explained."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Annotated, Any

import typer
from rich.text import Text

from tidegate.cli import output


def show(
    name: Annotated[str, typer.Argument(help="A mixer, as `tidegate list` names them.")],
    dim: Annotated[int, typer.Option(min=1, help="The width at which costs are counted.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    source: Annotated[bool, typer.Option(help="Print the code that is written from a cell's equations.")] = False,
    preset: Annotated[str | None, typer.Option(help="With --source: a preset, which may have other equations.")] = None,
) -> None:
    """Explain one mixer: equation, paper, options with defaults, presets, exceptions, an example."""
    from tidegate import registry
    from tidegate.bench import mixers

    info = registry.info(name)
    if source:
        if as_json:
            raise ValueError("--source prints Python, which --json does not; wanted one of the two")
        print(generated(name, preset))
        return
    if preset is not None:
        raise ValueError("--preset: wanted --source beside it; presets are part of what is shown without")
    documentation = inspect.getdoc(info.cls) or ""
    facts: dict[str, Any] = {
        "name": info.name,
        "class": f"{info.cls.__module__}.{info.cls.__qualname__}",
        "summary": documentation.partition("\n")[0],
        "equation": equation(documentation),
        "documentation": documentation,
        "family": info.family,
        "paper": info.paper,
        "title": info.title,
        "arxiv": info.arxiv,
        "options": {option: _option(parameter) for option, parameter in info.options.items()},
        "presets": {preset: dict(values) for preset, values in info.presets.items()},
        "tiny": dict(info.tiny),
        "exceptions": dict(info.exceptions),
        "cost": {"dim": dim, **dataclasses.asdict(mixers.cost(name, dim))},
        "example": example(name, dim),
    }
    if as_json:
        output.print_json(facts)
        return
    _print(facts, registry.FAMILIES[info.family][0])


def equation(documentation: str) -> str:
    """The indented blocks of a docstring, without their indentation; doctests are left out.

    >>> equation("A mixer.\\n\\nEquation::\\n\\n    h_t = a h_{t-1}\\n    y_t = h_t\\n\\nMore.\\n\\n>>> 1\\n1")
    'h_t = a h_{t-1}\\ny_t = h_t'
    """
    blocks: list[str] = []
    block: list[str] = []
    for line in [*documentation.splitlines(), "end"]:
        if line.startswith("    ") or (not line and block):
            block.append(line)
        elif block:
            blocks.append(textwrap.dedent("\n".join(block)).strip("\n"))
            block = []
    return "\n\n".join(text for text in blocks if not text.lstrip().startswith(">>>"))


def generated(name: str, preset: str | None = None) -> str:
    """The source that `tidegate.ops.Cell` writes for a mixer, with its default options or a preset's.

    Raises ValueError for a mixer that is no cell.
    """
    from tidegate import registry
    from tidegate.ops import Cell

    def cell(name: str, **options: Any) -> Any:
        return getattr(registry.build(name, 64, device="meta", **options), "cell", None)

    found = cell(name, **({} if preset is None else {"preset": preset}))
    if isinstance(found, Cell):
        return found.source
    others = [n for n in registry.names() if registry.info(n).family == "cell" and isinstance(cell(n), Cell)]
    raise ValueError(
        f"--source: {name} is not written as equations, there is no code made from them; its own is in "
        f"{registry.info(name).cls.__module__}. Cells are {', '.join(others)}"
    )


def example(name: str, dim: int) -> str:
    """Lines that build the mixer and feed it in two pieces, or at once where it needs that."""
    from tidegate import registry

    calls = "y, state = mixer(x[:, :60])\ny, state = mixer(x[:, 60:], state)  # the same as in one piece"
    return (
        "import tidegate, torch\n\n"
        f'mixer = tidegate.mixers.build("{name}", dim={dim})\n'
        f"x = torch.randn(1, 100, {dim})\n"
    ) + (calls if registry.info(name).streams else "y, _ = mixer(x)  # all of it at once")


def _option(parameter: inspect.Parameter) -> dict[str, Any]:
    annotation = parameter.annotation
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    required = parameter.default is inspect.Parameter.empty
    return {
        "type": "any" if annotation is inspect.Parameter.empty else kind,
        **({} if required else {"default": parameter.default}),
    }


def _print(facts: dict[str, Any], family: str) -> None:
    console = output.console()
    console.print(Text(facts["name"], style="bold"), Text(f"({family})"))
    source = ", ".join(part for part in (facts["title"], facts["arxiv"] and f"arXiv {facts['arxiv']}") if part)
    console.print(Text(f"paper: {facts['paper']}" + (f": {source}" if source else "")))
    console.print(Text(f"class: {facts['class']}\n"))
    console.print(Text(facts["documentation"] or "This class has no documentation.", no_wrap=True), soft_wrap=True)

    options = output.table(("option", "type", "default"), title="\nOptions")
    for option, values in facts["options"].items():
        options.add_row(option, values["type"], repr(values["default"]) if "default" in values else "required")
    console.print(options)

    for title, entries in (("Presets", facts["presets"]), ("Contract exceptions", facts["exceptions"])):
        console.print(Text(title, style="bold"))
        for key, value in entries.items():
            text = ", ".join(f"{k}={v!r}" for k, v in value.items()) if isinstance(value, dict) else value
            console.print(Text(f"  {key}: {text}"))
        if not entries:
            console.print("  none")
    tiny = ", ".join(f"{key}={value!r}" for key, value in facts["tiny"].items())
    console.print(Text.assemble(("Tests use ", "bold"), tiny or "the defaults"))

    cost = facts["cost"]
    state = (
        f"a state of {output.size(cost['state_bytes_per_token'])} per token"
        if cost["state_bytes_per_token"]
        else f"a state of {output.size(cost['state_bytes'])}"
    )
    flops = f"{output.count(cost['flops_per_token'])} flops per token"
    if cost["flops_per_cached_token"]:
        flops += f" and {output.count(cost['flops_per_cached_token'])} more for every token cached"
    line = f"{output.count(cost['parameters'])} parameters, {state}, {flops}"
    console.print(Text.assemble((f"At dim {cost['dim']} ", "bold"), line))
    console.print(Text("\nExample", style="bold"))
    console.print(Text(textwrap.indent(facts["example"], "  "), no_wrap=True), soft_wrap=True)

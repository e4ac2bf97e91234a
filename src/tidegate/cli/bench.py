"""`tidegate bench`: speed on this machine, as a table, JSON and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tidegate.cli import output


class Subject(StrEnum):
    """What can be timed."""

    ops = "ops"
    mixers = "mixers"
    cells = "cells"
    model = "model"
    decode = "decode"


@dataclass(frozen=True)
class Defaults:
    """Lengths with `--quick` and without, the batch, and the names of the sizes that the subject takes."""

    quick: str
    lengths: str
    batch: int
    sizes: tuple[str, ...]


DEFAULTS = {
    Subject.ops: Defaults("64,128", "512,1024,2048,4096,8192", 4, ("heads", "key_dim", "value_dim")),
    Subject.mixers: Defaults("32,64", "1024,2048,4096,8192,16384,32768", 1, ("dim",)),
    Subject.cells: Defaults("32", "256,1024", 16, ("dim", "heads")),
    Subject.model: Defaults("32,64", "512,4096,16384", 1, ("dim", "layers", "vocabulary")),
    Subject.decode: Defaults("10,100", "100,1000,10000,100000", 1, ("dim",)),
}
_QUICK = {"heads": 2, "key_dim": 16, "value_dim": 16, "dim": 32, "layers": 2}


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where the results go."""

    subject: Subject
    names: list[str]
    lengths: list[int]
    sizes: dict[str, int]
    repetitions: int
    patience: float
    coarse: bool
    memory: bool
    console: Any

    @property
    def rounds(self) -> dict[str, Any]:
        """Options of the sweeps over lengths."""
        from tidegate.bench.sweep import COARSE

        found: dict[str, Any] = {"repetitions": self.repetitions, "patience": self.patience}
        return {**found, "ceilings": COARSE} if self.coarse else found


def bench(
    subject: Annotated[Subject, typer.Argument(help="What to time; decode is single tokens of mixers.")] = Subject.ops,
    only: Annotated[str | None, typer.Option(help="Names to time, by commas; default all.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths T by commas (decode: tokens before).")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences per call, by commas; default 4 for ops, 16 for cells, else 1.")
    ] = None,
    threads: Annotated[str | None, typer.Option(help="Threads, by commas; default as PyTorch chooses.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads; default 4 for ops, 1 for cells.")] = None,
    key_dim: Annotated[int, typer.Option(min=1, help="Key dimension K (ops).")] = 64,
    value_dim: Annotated[int, typer.Option(min=1, help="Value dimension V (ops).")] = 64,
    dim: Annotated[int, typer.Option(min=1, help="Width D (all but ops).")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers (model).")] = 4,
    vocabulary: Annotated[int, typer.Option(min=1, help="Tokens in the vocabulary (model).")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; the median of them is reported.")] = 7,
    patience: Annotated[float, typer.Option(min=0, help="Longest time for all repetitions of a call, seconds.")] = 5.0,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory too, each case in a fresh process.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON and picture.")] = Path("reports/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
) -> None:
    """Time ops, mixers or whole models: forward, and with backward, over lengths, batches and threads.

    What is compared is measured in turns: all ops, cells or models of a length and the machine's own ceilings; all
    lengths of a mixer; one token after a short and a long past. Medians are reported, and the distance between
    quartiles as the spread. A model's training step includes the optimiser's.
    """
    from tidegate.bench import machine, report

    defaults = DEFAULTS[subject]
    if memory and subject is Subject.decode:
        raise ValueError("--memory: is of a forward and backward, which decode does not do; ask ops, mixers or model")
    chosen = numbers("--lengths", (defaults.quick if quick else defaults.lengths) if lengths is None else lengths)
    batches = [1 if quick else defaults.batch] if batch is None else numbers("--batch", batch)
    counts: list[Any] = [None] if threads is None else numbers("--threads", threads)
    heads = heads or (1 if subject is Subject.cells else 4)
    given = dict(heads=heads, key_dim=key_dim, value_dim=value_dim, dim=dim, layers=layers, vocabulary=vocabulary)
    sizes = {name: given[name] for name in defaults.sizes}
    if quick:
        sizes = {name: min(size, _QUICK.get(name, size)) for name, size in sizes.items()}
        repetitions, patience = min(repetitions, 2), min(patience, 0.02)
    out.mkdir(parents=True, exist_ok=True)  # before anything is measured: a folder that cannot be made is found now
    console = output.console()
    names = words("--only", only) if only is not None else _all(subject, max(chosen), dim, console)
    plan = Plan(subject, names, chosen, sizes, repetitions, patience, quick, memory, console)
    run = _decode if subject is Subject.decode else _sweep

    results: list[Any] = []
    used = []
    with console.status("measuring ...") as status:
        for count, size in product(counts, batches):
            with machine.threads(count):
                described = machine.describe()
                used.append(described["threads"])
                for result in run(plan, size):
                    results.append(result)
                    status.update(f"measured {_where(result)} ...")

    used = list(dict.fromkeys(used))
    settings = {"batch": batches, "threads": used, **{name: [size] for name, size in sizes.items()}}
    text = " ".join(f"{name}={','.join(map(str, values))}" for name, values in settings.items())
    title = f"{subject.value}, float32: {text}"
    if subject is Subject.decode:
        _print_decode(results, title, console)
        report.write_decode(out / "decode.png", results, title)
    else:
        _print_lengths(results, title, plan)
        training = "training step" if subject is Subject.model else "forward and backward"
        report.write_lengths(out / f"{subject.value}.png", results, title, training)
    options = {**sizes, "batch": batches, "threads": used, "lengths": chosen, "repetitions": repetitions}
    about = {"subject": subject.value, "machine": described, "options": {**options, "patience": patience}}
    report.write_json(out / f"{subject.value}.json", results, about)
    console.print(Text(f"{out / subject.value}.json, {out / subject.value}.png"), soft_wrap=True)


# -- what is measured --------------------------------------------------------------------------------------------------
def _sweep(plan: Plan, batch: int) -> Iterable[Any]:
    import importlib

    from tidegate.bench import memory

    sweep: Callable[..., Iterable[Any]] = importlib.import_module(f"tidegate.bench.{plan.subject.value}").sweep
    for found in sweep(plan.names, plan.lengths, batch=batch, **plan.sizes, **plan.rounds):
        if plan.memory:
            case = dict(batch=batch, length=found.length, threads=found.threads, **plan.sizes)
            found = dataclasses.replace(found, memory=memory.peak(plan.subject.value, found.name, **case))
        yield found


def _decode(plan: Plan, batch: int) -> Iterable[Any]:
    from tidegate.bench import mixers

    return mixers.decode(plan.names, plan.lengths, batch=batch, repetitions=2 * plan.repetitions, **plan.sizes)


def registered(*, streaming: bool = False) -> list[str]:
    """All mixers; with `streaming` those that have single steps and can stand in a language model."""
    from tidegate import registry

    return registry.names(streaming=streaming)


def _all(subject: Subject, longest: int, dim: int, console: Any) -> list[str]:
    """What is measured if no names are given."""
    if subject is Subject.ops:
        from tidegate.bench import ops

        return list(ops.CASES)
    if subject is Subject.cells:
        from tidegate.bench import cells

        return cells.names()
    if subject is Subject.decode:
        return _quick_to_fill(longest, dim, console)
    return registered(streaming=subject is Subject.model)


def _quick_to_fill(context: int, dim: int, console: Any) -> list[str]:
    """All mixers, without those for which a long past costs minutes: every token of it looks at all before."""
    from tidegate.bench import mixers
    from tidegate.nn.mixer import grows

    names = registered(streaming=True)
    left = [name for name in names if context > 20_000 and grows(mixers.build(name, dim).state_spec())]
    if left:
        console.print(f"Left out, as their past costs minutes: {', '.join(left)} (ask with --only).")
    return [name for name in names if name not in left]


def numbers(option: str, text: str) -> list[int]:
    """Positive numbers from a list by commas, ascending.

    >>> numbers("--lengths", "512, 128")
    [128, 512]
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise ValueError(f"{option}: seen {text!r}, wanted positive numbers by commas, as in 512,1024")
    return found


def words(option: str, text: str) -> list[str]:
    """Names from a list by commas, each once.

    >>> words("--only", "scan, gla")
    ['scan', 'gla']
    """
    found = [part.strip() for part in text.split(",")]
    if "" in found:
        raise ValueError(f"{option}: seen {text!r}, wanted names by commas, as in gla,mamba2")
    return list(dict.fromkeys(found))


# -- what is shown -----------------------------------------------------------------------------------------------------
def _where(result: Any) -> str:
    at = result.length if hasattr(result, "length") else result.context
    return f"{result.name} at {at:,} tokens, batch {result.batch}, threads {result.threads}"


def _setting(results: list[Any]) -> tuple[list[str], Callable[[Any], list[str]]]:
    """Columns for the batch and the threads, each only where it varies, and their cells."""
    varying = [key for key in ("batch", "threads") if len({getattr(result, key) for result in results}) > 1]
    return [f">{key}" for key in varying], lambda result: [str(getattr(result, key)) for key in varying]


def _print_lengths(results: list[Any], title: str, plan: Plan) -> None:
    from tidegate.bench import report

    peer = _peer(plan.subject)
    second = "training step" if plan.subject is Subject.model else "with backward"
    setting, cells = _setting(results)
    columns = ["name", *setting, ">T", ">forward", ">spread", f">{second}", ">spread", ">ns per token", ">both"]
    columns += [">of ceiling", ">both"]
    if plan.subject is Subject.model:
        columns += [">parameters", ">tokens per second"]
    columns += [">peak memory"] if plan.memory else []
    columns += [f">{peer} takes", ">both"] if peer else []
    table = output.table(columns, title=title)
    beside = report.peers(results, peer) if peer else [None] * len(results)
    order = list(dict.fromkeys(result.name for result in results))
    for result, other in sorted(zip(results, beside, strict=True), key=lambda pair: order.index(pair[0].name)):
        row = [result.name, *cells(result), f"{result.length:,}"]
        for timing in (result.forward, result.training):
            once = timing.repetitions == 1
            row += [output.duration(timing.median), "one run" if once else f"{timing.spread:.0%}"]
        row += [output.three_digits(1e9 * s) for s in (result.forward_per_token, result.training_per_token)]
        row += [f"{roof.reached:.0%} {roof.bound}" for roof in (result.forward_roof, result.training_roof)]
        if plan.subject is Subject.model:
            row += [output.count(result.parameters), f"{1 / result.training_per_token:,.0f}"]
        row += [output.size(result.memory)] if plan.memory else []
        if peer:
            row += [_times(other and other.forward, result.forward), _times(other and other.training, result.training)]
        table.add_row(*row)
    console = plan.console
    console.print(table)
    console.print(f"Ceilings in the same rounds (medians): {_ceilings(results)}.")
    if plan.subject is Subject.mixers:  # only there do lengths take turns, so that their ratio means something
        shown = ", ".join(f"{name} {factor:.2f}" for name, factor in report.flatness(results).items())
        console.print(Text(f"Cost per token at the longest T over the shortest, with backward: {shown}."))


def _peer(subject: Subject) -> str:
    """The name that the others are compared with, as it runs in the same rounds."""
    if subject is Subject.ops:
        from tidegate.bench import ops

        return ops.PEER
    if subject is Subject.cells:
        from tidegate.bench import cells

        return cells.PEER
    if subject is Subject.model:
        from tidegate.bench import model

        return model.PEER
    return ""


def _times(peer: Any, own: Any) -> str:
    return f"{output.three_digits(peer.median / own.median)} x" if peer else "not run"


def _ceilings(results: list[Any]) -> str:
    """The machine's rates, for each number of threads."""
    from statistics import median

    found = []
    for threads in dict.fromkeys(result.threads for result in results):
        rates = [result.rates for result in results if result.threads == threads]
        matmul, stream = (median(getattr(rate, kind) for rate in rates) / 1e9 for kind in ("matmul", "stream"))
        found.append(f"matmul {matmul:.0f} GFLOP/s and stream {stream:.1f} GB/s with threads={threads}")
    return "; ".join(found)


def _print_decode(results: list[Any], title: str, console: Any) -> None:
    contexts = list(dict.fromkeys(result.context for result in results))
    setting, cells = _setting(results)
    columns = ["name", *setting, ">called", *(f">compiled, after {context:,}" for context in contexts)]
    table = output.table([*columns, ">last over first", ">state at the end"], title=title)
    for name, which in dict.fromkeys((result.name, result.setting) for result in results):
        own = [result for result in results if (result.name, result.setting) == (name, which)]
        called = output.duration(own[0].step.median)
        times = [called, *(output.duration(r.compiled.median) if r.compiled else "none" for r in own)]
        ratio = own[-1].best / own[0].best
        table.add_row(name, *cells(own[0]), *times, f"{ratio:.2f}", output.size(own[-1].state_bytes))
    console.print(table)

"""`tidegate bench`: speed on this machine, as a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tidegate.cli import output


class Subject(StrEnum):
    """What can be timed."""

    ops = "ops"
    mixers = "mixers"
    decode = "decode"


# with --quick, and without
DEFAULT_LENGTHS = {
    Subject.ops: ("64,128", "512,1024,2048,4096,8192"),
    Subject.mixers: ("32,64", "1024,2048,4096,8192,16384,32768"),
    Subject.decode: ("10,100", "100,1000,10000,100000"),
}


def bench(
    subject: Annotated[Subject, typer.Argument(help="What to time; decode is single tokens of mixers.")] = Subject.ops,
    only: Annotated[str | None, typer.Option(help="Names to time, by commas; default all.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths T by commas (decode: tokens before).")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per call; default 4 for ops, else 1.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads (ops).")] = 4,
    key_dim: Annotated[int, typer.Option(min=1, help="Key dimension K (ops).")] = 64,
    value_dim: Annotated[int, typer.Option(min=1, help="Value dimension V (ops).")] = 64,
    dim: Annotated[int, typer.Option(min=1, help="Width D (mixers, decode).")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default as PyTorch chooses.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; the median of them is reported.")] = 7,
    patience: Annotated[float, typer.Option(help="Longest time for all repetitions of one call, seconds.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder for JSON and picture.")] = Path("reports/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
) -> None:
    """Time ops or mixers: forward, and forward with backward, over lengths.

    What is compared is measured in turns: all ops of a length and the machine's own ceilings; all lengths of a mixer;
    one token after a short and a long past. Medians are reported, and the distance between quartiles as the spread.
    """
    from tidegate.bench import machine, report

    sizes = numbers("--lengths", lengths or DEFAULT_LENGTHS[subject][not quick])
    batch = batch or (4 if subject is Subject.ops and not quick else 1)
    if quick:
        heads, key_dim, value_dim, dim = min(heads, 2), min(key_dim, 16), min(value_dim, 16), min(dim, 32)
        repetitions, patience = min(repetitions, 2), min(patience, 0.2)
    out.mkdir(parents=True, exist_ok=True)  # before anything is measured: a folder that cannot be made is found now
    names = [name.strip() for name in only.split(",")] if only else None
    console = output.console()
    with machine.threads(threads):
        described = machine.describe()
        rounds: dict[str, Any] = {"repetitions": repetitions, "patience": patience}
        if subject is Subject.ops:
            from tidegate.bench import ops

            shape = ops.Shape(batch, max(sizes), heads, key_dim, value_dim)
            options = {"batch": batch, "heads": heads, "key_dim": key_dim, "value_dim": value_dim}
            coarse = {"ceiling_size": 256, "stream_elements": 1 << 18} if quick else {}
            run: Iterable[Any] = ops.sweep(names or list(ops.CASES), sizes, shape, **rounds, **coarse)
        else:
            from tidegate.bench import mixers

            options = {"batch": batch, "dim": dim}
            if subject is Subject.mixers:
                run = mixers.sweep(names or registered(), sizes, **options, **rounds)
            else:
                names = names or _quick_to_fill(max(sizes), dim, console)
                run = mixers.decode(names, sizes, **options, repetitions=2 * repetitions)
        results = _collect(run, console)

    sizes_text = " ".join(f"{name}={value}" for name, value in options.items())
    title = f"{subject.value} on {described['threads']} threads, float32: {sizes_text}"
    if subject is Subject.decode:
        _print_decode(results, title, console)
        report.write_decode(out / "decode.png", results, title)
    else:
        _print_lengths(results, title, console)
        report.write_lengths(out / f"{subject.value}.png", results, title)
    about = {"subject": subject.value, "machine": described, "options": {**options, **rounds}}
    report.write_json(out / f"{subject.value}.json", results, about)
    console.print(Text(f"{out / subject.value}.json, {out / subject.value}.png"), soft_wrap=True)


def registered() -> list[str]:
    """All mixers."""
    from tidegate import registry

    return registry.names()


def _quick_to_fill(context: int, dim: int, console: Any) -> list[str]:
    """All mixers, without those for which a long past costs minutes: every token of it looks at all before."""
    from tidegate.bench import mixers

    names = registered()
    left = [name for name in names if context > 20_000 and mixers.grows(mixers.build(name, dim))]
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


def _collect(run: Iterable[Any], console: Any) -> list[Any]:
    """All results, naming on a terminal what was measured last."""
    results = []
    with console.status("measuring ...") as status:
        for result in run:
            results.append(result)
            at = result.length if hasattr(result, "length") else result.context
            status.update(f"measured {result.name} at {at:,} tokens ...")
    return results


def _print_lengths(results: list[Any], title: str, console: Any) -> None:
    from tidegate.bench import report
    from tidegate.bench.ops import PEER

    counted = any(result.reached is not None for result in results)
    columns = ["name", ">T", ">forward", ">spread", ">with backward", ">spread", ">ns per token", ">both"]
    table = output.table(columns + ([">of ceiling", ">both", f">{PEER} takes"] if counted else []), title=title)
    peers = {result.length: result.forward.median for result in results if result.name == PEER}
    order = list(dict.fromkeys(result.name for result in results))
    for result in sorted(results, key=lambda r: order.index(r.name)):
        row = [result.name, f"{result.length:,}"]
        for timing in (result.forward, result.training):
            once = timing.repetitions == 1
            row += [output.duration(timing.median), "one run" if once else f"{timing.spread:.0%}"]
        row += [output.three_digits(1e9 * s) for s in (result.forward_per_token, result.training_per_token)]
        if counted:
            row += [f"{result.reached:.0%} {result.bound}", f"{result.reached_training:.0%}"]
            peer = peers.get(result.length)
            row.append(f"{output.three_digits(peer / result.forward.median)} x" if peer else "not run")
        table.add_row(*row)
    console.print(table)
    if counted:
        ceilings = {result.bound: result.ceiling for result in results}
        text = {"matmul": "matmul {:.0f} GFLOP/s", "stream": "stream {:.1f} GB/s"}
        found = [text[bound].format(rate / 1e9) for bound, rate in ceilings.items()]
        console.print(f"Ceilings in the same rounds (longest T): {', '.join(found)}.")
    else:  # only there do lengths take turns, so that their ratio means something
        shown = ", ".join(f"{name} {factor:.2f}" for name, factor in report.flatness(results).items())
        console.print(Text(f"Cost per token at the longest T over the shortest, with backward: {shown}."))


def _print_decode(results: list[Any], title: str, console: Any) -> None:
    contexts = list(dict.fromkeys(result.context for result in results))
    columns = ["name", *(f">after {context:,}" for context in contexts), ">last over first", ">state at the end"]
    table = output.table(columns, title=title)
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        times = [output.duration(result.step.median) for result in own]
        ratio = own[-1].step.median / own[0].step.median
        table.add_row(name, *times, f"{ratio:.2f}", output.size(own[-1].state_bytes))
    console.print(table)

"""`tidegate reproduce`: a paper's central claim as an experiment, with a verdict."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tidegate.cli import output

REPORTS = Path("reports")


def reproduce(
    paper: Annotated[str | None, typer.Argument(help="The paper's name, such as gla.")] = None,
    list_papers: Annotated[bool, typer.Option("--list", help="Show all papers with their last verdict.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with other random numbers; a verdict takes 3.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report [default: reports/PAPER]; with --list, of all reports.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Does it run? In seconds, without a verdict.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default as PyTorch chooses (smoke: 1).")] = None,
) -> None:
    """Run a paper's central claim at laptop scale: claim beside measurement.

    Writes results.md (tables), results.json (every number, seeds, versions) and results.png into a folder.
    """
    if list_papers and paper is None:
        _list(out or REPORTS)
    elif paper is None or list_papers:
        raise ValueError("PAPER: wanted either the name of a paper or --list, which shows them")
    else:
        _run(paper, 1 if smoke else seeds, out, smoke, threads)


def _run(slug: str, seeds: int, out: Path | None, smoke: bool, threads: int | None) -> None:
    from tidegate.papers import Situation, experiment, paper, report

    wanted = paper(slug)
    # A smoke run must not take the place of a verdict.
    folder = out or (REPORTS / "smoke" / slug if smoke else REPORTS / slug)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent: a folder that cannot be made is found now
    command = ["tidegate", "reproduce", slug, *(["--smoke"] if smoke else ["--seeds", str(seeds)])]
    command += [*(["--out", str(out)] if out else []), *(["--threads", str(threads)] if threads else [])]

    console = output.console()
    console.print(Text(f"{wanted.title} (arXiv {wanted.arxiv})\nclaim: {wanted.claim}\n"))
    with _threads(threads or (1 if smoke else None)), console.status("") as status:
        situation = Situation(smoke, say=status.update, note=lambda text: console.print(Text(text)))
        record, measured = experiment.run(wanted, seeds, situation)
        report.write(folder, wanted, record, measured, shlex.join(command))
    for tried in record["experiments"]:
        _print_numbers(tried, console)
        if not smoke:
            _print_checks(tried, console)
    verdict = record["verdict"] or "none"
    console.print(Text(f"threshold: {wanted.threshold}"))
    console.print(Text(f"verdict: {verdict} ({record['reason']}; {report.duration(record['seconds'])})", style="bold"))
    console.print(Text(", ".join(str(folder / f"results.{kind}") for kind in ("md", "json", "png"))), soft_wrap=True)


def _threads(count: int | None) -> Any:
    from tidegate.bench import machine

    return machine.threads(count)


def _print_numbers(tried: dict[str, Any], console: Any) -> None:
    from tidegate.papers.report import number

    names = list(dict.fromkeys(name for row in tried["medians"].values() for name in row))
    seeds = len(tried["measured"])
    several = f", median of {seeds} seeds" if seeds > 1 else ""
    table = output.table(["", *(f">{name}" for name in names)], title=f"{tried['name']}{several}")
    for system, row in tried["medians"].items():
        table.add_row(system, *(number(row[name]) if name in row else "" for name in names))
    console.print(table)


def _print_checks(tried: dict[str, Any], console: Any) -> None:
    from tidegate.papers.report import number

    for check in tried["checks"]:
        sign = "yes" if check["met"] else "no "
        own = "" if check["deciding"] else " (not deciding)"
        text = f"  {sign} {check['text']}: {number(check['median'])} {check['relation']} {check['bound']:g}{own}"
        console.print(Text(text))
    console.print()


def _list(reports: Path) -> None:
    from tidegate.papers import papers, report

    table = output.table(["paper", "arXiv", "claim", "verdict", ">seeds", "when"], title=f"reports in {reports}")
    for slug, known in papers().items():
        try:
            record = report.read(reports / slug)
            damaged = ""
        except ValueError:
            record, damaged = None, "unreadable report"
        if record is None:
            table.add_row(slug, known.arxiv, known.claim, damaged or "not run", "", "")
        else:
            when, seeds = record["finished"][:10], str(len(record["seeds"]))
            table.add_row(slug, known.arxiv, known.claim, record["verdict"] or "smoke run only", seeds, when)
    console = output.console()
    console.print(table)
    console.print("`tidegate reproduce PAPER` runs one.")

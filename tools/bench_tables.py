"""Write the measured tables of docs/benchmarks.md and docs/peers.md from the JSON that `tidegate bench` left behind.

    .venv/bin/python tools/bench_tables.py [reports/bench]

A table stands between `<!-- bench: NAME -->` and `<!-- /bench -->`, where NAME.json (or NAME.md, of peers) holds its
figures; without that file it stays as it was. The table `cells` is made of all NAME/cells.json, one column for each.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tidegate.cli.output import duration, size, three_digits

ROOT = Path(__file__).parent.parent
PEERS = {"ops": "torch/sdpa", "model": "attention"}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "reports" / "bench"
    for page in (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "peers.md"):
        text = page.read_text()
        text = re.sub(
            r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)",
            lambda found: found[1] + _table(folder, found[2], found[0]) + found[3],
            text,
            flags=re.DOTALL,
        )
        page.write_text(text)


def _table(folder: Path, name: str, before: str) -> str:
    if name.startswith("peers"):
        path = folder / f"{name}.md"
        return (
            f"\n{path.read_text().strip()}\n\n"
            if path.is_file()
            else before.split("\n", 1)[1].rsplit("\n", 1)[0] + "\n"
        )
    paths = sorted(folder.glob("*/cells.json")) if name == "cells" else [folder / f"{name}.json"]
    if not all(path.is_file() for path in paths) or not paths:
        return before.split("\n", 1)[1].rsplit("\n", 1)[0] + "\n"
    contents = [json.loads(path.read_text()) for path in paths]
    subject, results = contents[0]["subject"], contents[0]["results"]
    if subject == "cells":
        rows = _cells(contents)
    else:
        rows = _decode(results) if subject == "decode" else _lengths(results, subject)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n" + "\n".join(lines) + "\n\n"


def _lengths(results: list[dict[str, Any]], subject: str) -> list[list[str]]:
    peer = PEERS.get(subject)
    several = {(result["batch"], result["threads"]) for result in results}
    head = [subject.removesuffix("s"), *(["B", "threads"] if len(several) > 1 else []), "T", "forward"]
    head += ["training step" if subject == "model" else "with backward", "ns per token", "both", "of ceiling", "both"]
    head += ["parameters", "tokens per second"] if subject == "model" else []
    head += ["peak memory"] if any(result["memory"] for result in results) else []
    head += [f"`{peer}` takes", "both"] if peer else []
    rows = [head]
    order = list(dict.fromkeys(result["name"] for result in results))
    for result in sorted(results, key=lambda result: order.index(result["name"])):
        per_token = [result[phase]["median"] / result["tokens"] for phase in ("forward", "training")]
        row = [f"`{result['name']}`", *([str(result["batch"]), str(result["threads"])] if len(several) > 1 else [])]
        row += [f"{result['length']:,}", *(duration(result[phase]["median"]) for phase in ("forward", "training"))]
        row += [three_digits(1e9 * seconds) for seconds in per_token]
        row += [f"{roof['reached']:.0%} {roof['bound']}" for roof in (result["forward_roof"], result["training_roof"])]
        row += [f"{result['parameters']:,}", f"{1 / per_token[1]:,.0f}"] if subject == "model" else []
        row += [size(result["memory"]) if result["memory"] else ""] if "peak memory" in head else []
        if peer:
            same = ("length", "batch", "threads")
            beside = [o for o in results if o["name"] == peer and all(o[key] == result[key] for key in same)]
            for phase in ("forward", "training"):
                ratio = beside[0][phase]["median"] / result[phase]["median"] if beside else None
                row.append(f"{three_digits(ratio)} x" if ratio else "not run")
        rows.append(row)
    return rows


def _decode(results: list[dict[str, Any]]) -> list[list[str]]:
    contexts = list(dict.fromkeys(result["context"] for result in results))
    rows = [["mixer", "called", *(f"compiled, after {context:,} tokens" for context in contexts), "ratio", "state"]]
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result for result in results if result["name"] == name]
        best = [(result["compiled"] or result["step"])["median"] for result in own]
        compiled = [duration(result["compiled"]["median"]) if result["compiled"] else "none" for result in own]
        called = duration(own[0]["step"]["median"])
        rows.append([f"`{name}`", called, *compiled, f"{best[-1] / best[0]:.2f}", size(own[-1]["state_bytes"])])
    return rows


def _cells(contents: list[dict[str, Any]]) -> list[list[str]]:
    """Forward with backward of every cell at every shape, with what PyTorch's own and a loop take."""
    rows: dict[str, list[str]] = {}
    head = ["cell"]
    for content in contents:
        options = content["options"]
        shape = f"B{options['batch'][0]} T{options['lengths'][0]} H{options['dim']}"
        head += [shape + (f", {options['heads']} heads" if options["heads"] > 1 else ""), "of ceiling", "loop takes"]
        found = {result["name"]: result for result in content["results"]}
        for name, result in found.items():
            if name.startswith("loop/"):
                continue
            seconds, loop = result["training"]["median"], found.get(f"loop/{name}")
            row = rows.setdefault(name, [f"`{name}`"])
            row += [duration(seconds), f"{result['training_roof']['reached']:.0%}"]
            row.append(f"{three_digits(loop['training']['median'] / seconds)} x" if loop else "")
    return [head, *rows.values()]


if __name__ == "__main__":
    main()

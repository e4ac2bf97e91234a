"""This library beside its peers: the same inputs, outputs compared first, then timed in turns.

    python -m tidegate.bench.peers [--only ...] [--threads 1,2] [--batch 1,8] [--lengths 512,4096] [--dims 256,1024]

Every library runs in a process of its own (`make bench-peers` makes the environments), this one too, all with the
same code around the calls. Equal outputs are what allows a comparison of the forward, equal gradients one of training;
what differs is reported and not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tidegate.bench import peer_inputs
from tidegate.bench.peer_process import PeerError, PeerProcess, difference

# Relative error (2-norm, worst tensor) above which a peer computes something else. In float32 two ways to sum the same
# recurrence differ by 1e-6 to 1e-4, another convention by 1e-1 and more.
TOLERANCE = 2e-3
DECODED = 64  # tokens after which the outputs of a decode step are compared
OURS = "peer_tidegate"
ENVIRONMENTS = {
    ".venv-peers": (
        *("peer_torch", "peer_transformers", "peer_mambapy", "peer_accelerated_scan", "peer_opengdn"),
        *("peer_mlstm_kernels", "peer_xlstm"),
    ),
    ".venv-peers-fla": ("peer_fla", "peer_flashrnn"),
}


@dataclass(frozen=True)
class Point:
    """Where a comparison is made. `dim` is 0 for ops."""

    threads: int
    batch: int
    length: int
    dim: int


@dataclass(frozen=True)
class Side:
    """Seconds per call: the median, and the distance between the quartiles as a share of it."""

    seconds: float
    spread: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One peer's function at one point, in one phase: forward, training (with all gradients), decode or memory.

    For `memory` the sides hold bytes. Without sides there is no comparison, and `note` says why.
    """

    function: str
    peer: str
    phase: str
    threads: int
    batch: int
    length: int
    dim: int
    error: float | None = None
    ours: Side | None = None
    theirs: Side | None = None
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as long (or as much) as ours the peer takes."""
        return self.theirs.seconds / self.ours.seconds if self.ours and self.theirs else None

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is what this library aims at; None where nothing is aimed at or compared."""
        return None if self.ratio is None or self.target is None else self.ratio >= self.target


def summary(samples: Sequence[float]) -> Side:
    """Median and spread of some samples.

    >>> summary([1.0, 2.0, 3.0])
    Side(seconds=2.0, spread=0.5, rounds=3)
    """
    middle = statistics.median(samples)
    if len(samples) < 2:
        return Side(middle, 0.0, len(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Side(middle, (high - low) / middle, len(samples))


@dataclass
class Comparison:
    """How comparisons are made: `seconds` is the longest single call a peer is waited for."""

    repetitions: int = 7
    seconds: float = 20.0
    shortest: float = 0.1
    pause: float = 0.05
    vocab: int = 256
    layers: int = 4

    def rows(self, ours: PeerProcess, theirs: PeerProcess, key: str, entry: Sequence[str], at: Point) -> Iterator[Row]:
        """Compare one adapter at one point, at a smaller T where the peer would take too long or too much."""
        function, name, note = entry
        kind = peer_inputs.kind(function)
        row = Row(function, name, "", at.threads, at.batch, at.length, at.dim, note=note)
        with tempfile.TemporaryDirectory() as folder:
            own, files = f"{function} tidegate", _Files(folder)
            options: dict[str, Any] = {"dim": at.dim, "vocab": self.vocab, "layers": self.layers}
            setup: dict[str, Any] = {"options": options}
            try:
                if kind != "op":
                    setup["weights"] = files.weights
                    ours.ask("weights", key=own, options=options, file=files.weights)
                try:
                    length, limit = self._as_far_as_it_goes(theirs, key, setup, files, at)
                except PeerError as problem:
                    yield replace(row, note=_join(note, f"the peer failed: {problem}"[:200]))
                    return
                if kind != "decode" and length < at.length:
                    row = replace(row, length=length, note=_join(note, f"T = {at.length:,}: {limit}"))
                ours.ask("case", key=own, inputs=files.inputs(length), **setup)
                ours.ask("outputs", file=files.ours, gradients=kind != "decode")
            except PeerError as problem:
                yield replace(row, note=_join(note, f"tidegate failed: {problem}"[:200]))
                return
            for phase, error, tensor in files.differences():
                row = replace(row, error=error, phase=phase)
                if not error <= TOLERANCE:
                    yield replace(row, note=_join(row.note, f"computes something else ({tensor})"))
                    break
                mine, other = self.timed(ours, theirs, phase)
                yield replace(row, ours=mine, theirs=other, target=peer_inputs.target(function, phase, note))
            for side in (ours, theirs):
                side.ask("end")

    def _as_far_as_it_goes(
        self, theirs: PeerProcess, key: str, setup: dict[str, Any], files: _Files, at: Point
    ) -> tuple[int, str]:
        """Leave the peer's outputs at the largest T up to the wanted one that it does in time; what stopped it."""
        function = key.split(" ")[0]
        gradients = peer_inputs.kind(function) != "decode"
        wanted = at.length if gradients else DECODED
        length, reached, limit, calls = min(128, wanted), 0, "", 2  # libraries warm up in the first call
        while True:
            files.draw(function, at, length)
            try:
                for _ in range(calls):
                    theirs.ask("case", key=key, inputs=files.inputs(length), **setup)
                    seconds = theirs.ask("outputs", file=files.theirs, gradients=gradients)["seconds"]
            except PeerError as problem:
                if not reached or not _is_memory(problem):
                    raise
                theirs.again(threads=at.threads)
                limit, wanted, length = "more memory than allowed", reached, reached
                continue
            reached, calls = length, 1
            # Between linear and quadratic: some peers copy the whole sequence at every token.
            if length < wanted and seconds * 2**1.4 > self.seconds:
                limit, wanted = f"more than {self.seconds:g} s", length
            if length == wanted:
                return length, limit
            length = min(2 * length, wanted)

    def timed(self, ours: PeerProcess, theirs: PeerProcess, phase: str) -> tuple[Side, Side]:
        """Rounds of one sample each, ours and theirs in turns."""
        sides = (ours, theirs)
        loops: list[int] = []
        samples: tuple[list[float], list[float]] = ([], [])
        longest = 0.0
        for side in sides:
            time.sleep(self.pause)
            once = max(side.ask("sample", phase=phase)["seconds"], 1e-7)
            loops.append(max(1, min(2000, round(self.shortest / once))))
            longest = max(longest, once)
        rounds = max(1, min(self.repetitions, int(self.seconds / longest)))
        for _ in range(rounds):
            for side, loop, seen in zip(sides, loops, samples, strict=True):
                time.sleep(self.pause)  # so that the other's threads, which wait spinning, have gone to sleep
                seen.append(side.ask("sample", phase=phase, loops=loop)["seconds"])
        return summary(samples[0]), summary(samples[1])

    def memory(
        self, ours: PeerProcess, theirs: PeerProcess, key: str, entry: Sequence[str], at: Point, gigabytes: float
    ) -> Row:
        """Peak bytes that one training step adds, each side in a fresh process, at the longest T the peer survives."""
        function, name, note = entry
        row = Row(function, name, "memory", at.threads, at.batch, at.length, at.dim, note=note)
        length, sides = at.length, ((ours, f"{function} tidegate"), (theirs, key))
        with tempfile.TemporaryDirectory() as folder:
            files = _Files(folder)
            setup: dict[str, Any] = {"options": {"dim": at.dim}}
            if peer_inputs.kind(function) == "layer":
                setup["weights"] = files.weights
                ours.ask("weights", key=f"{function} tidegate", options=setup["options"], file=files.weights)
            while length >= 512:
                files.draw(function, at, 128)
                files.draw(function, at, length)
                try:
                    peaks = [self._peak(side, own, setup, files, length, gigabytes) for side, own in sides]
                except PeerError as problem:
                    if not _is_memory(problem):
                        return replace(row, note=_join(note, f"failed: {problem}"[:200]))
                    length //= 2
                    continue
                if length < at.length:
                    row = replace(row, note=_join(note, f"T = {at.length:,}: more than {gigabytes:g} GB"))
                return replace(row, length=length, ours=peaks[0], theirs=peaks[1])
        return replace(row, note=_join(note, f"more than {gigabytes:g} GB even at T = 512"))

    def _peak(
        self, side: PeerProcess, key: str, setup: dict[str, Any], files: _Files, length: int, gigabytes: float
    ) -> Side:
        side.again(keep_freed_memory=False, gigabytes=gigabytes)
        for T in (128, length):  # the first compiles and imports
            side.ask("case", key=key, inputs=files.inputs(T), **setup)
            peak = side.ask("memory")["bytes"]
        return Side(peak, 0.0, 1)


class _Files:
    """Tensors of one comparison on their way between the processes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.weights, self.ours, self.theirs = (f"{folder}/{part}" for part in ("weights", "ours", "theirs"))

    def inputs(self, length: int) -> str:
        return f"{self.folder}/inputs-{length}"

    def draw(self, function: str, at: Point, length: int) -> None:
        from safetensors.torch import save_file

        inputs = peer_inputs.draw(function, at.batch, length, at.dim)
        save_file({name: x.contiguous() for name, x in inputs.items()}, self.inputs(length))

    def differences(self) -> Iterator[tuple[str, float, str]]:
        """Phases with their largest error and the tensor that has it: the output decides about forward and decode, all
        gradients about training."""
        from safetensors.torch import load_file

        ours, theirs = load_file(self.ours), load_file(self.theirs)
        outputs = [{"output": side.pop("output")} for side in (ours, theirs)]
        yield "forward" if theirs else "decode", *difference(*outputs)
        if theirs:
            yield "training", *difference(ours, theirs)


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _is_memory(error: PeerError) -> bool:
    return any(word in str(error) for word in ("memory", "MemoryError", "has ended"))


def points(
    function: str, threads: Sequence[int], batch: Sequence[int], lengths: Sequence[int], dims: Sequence[int]
) -> Iterator[Point]:
    """All points at which a function is compared, the longest first."""
    kind = peer_inputs.kind(function)
    for count in threads:
        for dim in (0,) if kind == "op" else dims:
            if kind == "decode":
                yield Point(count, 1, 1, dim)
                continue
            for rows in batch:
                for length in sorted(lengths, reverse=True):
                    yield Point(count, rows, length, dim)


def run(arguments: argparse.Namespace, console: Any) -> tuple[list[Row], dict[str, Any]]:
    """All comparisons, and what was found missing on the way."""
    import sys

    folder, rows = Path(arguments.adapters), []
    limits = {"threads": 1, "gigabytes": arguments.gigabytes}
    about: dict[str, Any] = {"versions": {}, "missing": {}}
    how = Comparison(arguments.repetitions, arguments.seconds, pause=arguments.pause)
    with PeerProcess(sys.executable, folder, [OURS], **limits) as ours:
        known = ours.ask("adapters")
        about["versions"]["tidegate"] = known["versions"]
        available = {function for function, _, _ in known["adapters"].values()}
        for environment, modules in ENVIRONMENTS.items():
            python = Path(environment) / "bin" / "python"
            if not python.exists():
                about["missing"][environment] = "not there; `make bench-peers` makes it"
                continue
            with PeerProcess(python.absolute(), folder, modules, **limits) as theirs:
                listed = theirs.ask("adapters")
                about["versions"][environment] = listed["versions"]
                about["missing"] |= listed["missing"]
                for key, entry in listed["adapters"].items():
                    if arguments.only and not any(part in key for part in arguments.only):
                        continue
                    if entry[0] not in available:
                        about["missing"][key] = "tidegate has no such function yet"
                        continue
                    rows += _one(how, ours, theirs, key, entry, arguments, console)
    return rows, about


def _one(how: Comparison, ours: Any, theirs: Any, key: str, entry: Any, arguments: Any, console: Any) -> list[Row]:
    rows = []
    if arguments.memory:
        if entry[0].startswith("decode"):
            return []
        for at in points(entry[0], [max(arguments.threads)], [1], [arguments.memory], arguments.dims[:1]):
            rows.append(how.memory(ours, theirs, key, entry, at, arguments.gigabytes))
            console.print(_line(rows[-1]), soft_wrap=True, markup=False, highlight=False)
        return rows
    done: dict[Point, int] = {}  # the T that was reached instead of a longer one
    for at in points(entry[0], arguments.threads, arguments.batch, arguments.lengths, arguments.dims):
        place = replace(at, length=0)
        if at.length >= done.get(place, at.length + 1):
            continue
        for side in (ours, theirs):
            if side.resident_bytes > 3e9:  # freed memory is kept, and others are to have room
                side.again()
            side.ask("limit", threads=at.threads)
        try:
            found = list(how.rows(ours, theirs, key, entry, at))
        except PeerError as error:
            text = f"failed: {error}"[:200]
            found = [Row(entry[0], entry[1], "", at.threads, at.batch, at.length, at.dim, note=text)]
            theirs.again()
            ours.again()
        done[place] = min(row.length for row in found)
        for row in found:
            console.print(_line(row), soft_wrap=True, markup=False, highlight=False)
        rows += found
    return rows


def _line(row: Row) -> str:
    ratio = "no comparison" if row.ratio is None else f"{row.ratio:.2f} x"
    where = f"{row.threads} threads, B {row.batch}, T {row.length:,}" + (f", D {row.dim}" if row.dim else "")
    return f"{row.function} | {row.peer} | {where} | {row.phase} | {ratio} | {row.note}"


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tidegate.bench.peers", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), default=[], help="parts of functions' or peers' names, by commas")
    add("--threads", type=_numbers, default=[1, 2])
    add("--batch", type=_numbers, default=[1, 8])
    add("--lengths", type=_numbers, default=[512, 4096], help="powers of two: some peers take nothing else")
    add("--dims", type=_numbers, default=[256, 1024], help="widths of layers and models")
    add("--repetitions", type=int, default=7, help="rounds")
    add("--seconds", type=float, default=20.0, help="the longest call of a peer to wait for; beyond, T is halved")
    add("--pause", type=float, default=0.05, help="seconds between the two sides' turns")
    add("--memory", type=int, default=0, metavar="T", help="measure the peak memory of a training step instead")
    add("--gigabytes", type=float, default=12.0, help="memory that one side may take")
    add("--quick", action="store_true", help="one small point, to see that it runs")
    add("--adapters", default="bench/peers", help="the folder with worker.py")
    add("--out", type=Path, default=Path("reports/bench"))
    found = parser.parse_args(arguments)
    if found.quick:
        found.threads, found.batch, found.lengths, found.dims = [1], [1], [256], [256]
        found.repetitions, found.seconds = min(found.repetitions, 3), min(found.seconds, 5.0)
    if not (Path(found.adapters) / "worker.py").exists():
        parser.error(f"--adapters: there is no worker.py in {found.adapters}; run this at the root of a clone")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and write a table, JSON and a picture."""
    from rich.console import Console

    from tidegate.bench import machine, peer_report

    given, console = parse(arguments), Console()
    rows, about = run(given, console)
    name = "peers-memory" if given.memory else "peers"
    content = {"machine": machine.describe(), "tolerance": TOLERANCE, **about, "results": rows}
    peer_report.show(rows, about, console)
    peer_report.write(given.out, name, {**content, "results": [_plain(row) for row in rows]}, rows)
    console.print(f"{given.out / name}.json, {given.out / name}.png", soft_wrap=True)


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "ratio": row.ratio, "reached": row.reached}


if __name__ == "__main__":
    main()

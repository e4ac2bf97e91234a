"""`tidegate doctor`: what this machine offers, and what tidegate makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tidegate.cli import output


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Measure the ceilings coarsely.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile all kernels now, or see that they are; nothing else is examined.")
    ] = False,
) -> None:
    """Examine this installation: versions, cores, backends and why, measured ceilings, kernel cache, warnings."""
    from tidegate.bench import machine

    if warm:
        _warm(as_json)
        return
    facts: dict[str, Any] = {**machine.describe(), "backends": backends(), "cache": cache()}
    sizes = {"size": 512, "repetitions": 3} if quick else {}
    facts["matmul_gflops"] = machine.matmul_gflops(**sizes)
    sizes = {"elements": 1 << 22, "repetitions": 3} if quick else {}
    facts["stream_gbs"] = machine.stream_gbs(**sizes)
    facts["warnings"] = warnings(facts)
    if as_json:
        output.print_json(facts)
    else:
        _print(facts)


def backends() -> list[dict[str, str]]:
    """For every op, device and dtype: the backend and the reason."""
    import torch

    from tidegate import ops
    from tidegate.backend import explain

    devices = ["cpu"] + [kind for kind in ("cuda", "mps", "xpu") if getattr(torch, kind).is_available()]
    found = []
    for op in ops.__all__:
        fused = Path(_folder(getattr(ops, op)), "numba_cpu.py").is_file()
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        for device in devices:
            for dtype in [*dtypes, torch.complex64] if op == "scan" else dtypes:
                chosen, reason = explain(device, dtype)
                if chosen == "numba" and not fused:
                    chosen, reason = "parallel", "PyTorch's own fused attention serves this op"
                name = str(dtype).removeprefix("torch.")
                found.append({"op": op, "device": device, "dtype": name, "backend": chosen, "reason": reason})
    return found


def cache() -> dict[str, Any]:
    """Where compiled kernels are kept, how many there are, and whether they are older than what they were made from."""
    import numba

    import tidegate

    package = Path(tidegate.__file__).parent
    own = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    writable = os.access(own or package / "ops", os.W_OK)
    # Numba keeps them beside the source where it can, else in the user's cache folder.
    folder = Path(own) if own else package if writable else Path("~/.cache/numba").expanduser()
    files = [file for ending in ("nbi", "nbc") for file in folder.rglob(f"*.{ending}")] if folder.is_dir() else []
    toolkit = (package / "ops" / "kernels.py").stat().st_mtime
    return {
        "folder": str(folder),
        "writable": writable or os.access(folder if folder.exists() else Path.home(), os.W_OK),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "stale": sum(file.stat().st_mtime < toolkit for file in files if file.suffix == ".nbc"),
    }


def warnings(facts: dict[str, Any]) -> list[str]:
    """What makes this machine slower, or its figures less trustworthy, than need be."""
    found = []
    if facts["threads"] > facts["cores"]:
        found.append(
            f"PyTorch uses {facts['threads']} threads on {facts['cores']} cores; they get in each other's way. "
            f"Set OMP_NUM_THREADS={facts['cores']}"
        )
    elif facts["threads"] < facts["cores"]:
        found.append(
            f"PyTorch uses {facts['threads']} of {facts['cores']} cores; OMP_NUM_THREADS or torch.set_num_threads "
            "decides"
        )
    found += cache_warnings(facts["cache"])
    if not {"AVX2", "NEON", "SVE"} & set(facts["simd"]):
        found.append("this processor has no AVX2 (or NEON); kernels run, but several times slower than measured")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > facts["cores"]:
        found.append(f"the machine is busy (load {load:.1f} on {facts['cores']} cores); measured figures are too low")
    return found


def cache_warnings(cached: dict[str, Any]) -> list[str]:
    """What is wrong with the kernel cache."""
    found = []
    if not cached["writable"]:
        found.append(
            f"{cached['folder']} is not writable, so kernels are compiled anew in every process (seconds). "
            "Set NUMBA_CACHE_DIR to a folder that is"
        )
    if cached["stale"]:
        found.append(
            f"{cached['stale']} compiled kernels are older than ops/kernels.py and may not contain its "
            "changes; `make clean` removes them"
        )
    return found


def _warm(as_json: bool) -> None:
    """Compile or load every kernel, and say which and how long it took."""
    import dataclasses

    from tidegate.bench.warm import warm

    console = output.console()
    with console.status("compiling ..."):
        done = list(warm())
    seconds, kept = sum(one.seconds for one in done), cache()
    problems = cache_warnings(kept)
    if as_json:
        warmed = [dataclasses.asdict(one) for one in done]
        output.print_json({"warmed": warmed, "seconds": seconds, "cache": kept, "warnings": problems})
        return
    table = output.table(("call", "direction", "compiled", "loaded from the cache", ">took"), title="Kernels")
    for one in done:
        table.add_row(
            one.what, one.direction, *map(", ".join, (one.compiled, one.loaded)), output.duration(one.seconds)
        )
    console.print(table)
    compiled, loaded = (sum(len(getattr(one, kind)) for one in done) for kind in ("compiled", "loaded"))
    total = output.duration(seconds)
    console.print(Text(f"{compiled} compiled, {loaded} loaded, {total}; kept in {kept['folder']}"), soft_wrap=True)
    _print_warnings(problems, console)


def _folder(function: Any) -> Path:
    import inspect

    return Path(inspect.getfile(inspect.unwrap(function))).parent


def _print(facts: dict[str, Any]) -> None:
    console = output.console()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("tidegate", "torch", "numba", "python"))
    simd = ", ".join(facts["simd"]) or "no wide vectors"
    cached = facts["cache"]
    lines = {
        "versions": versions,
        "machine": f"{facts['system']}, {facts['processor']}",
        "processor": f"{facts['cores']} cores, {facts['threads']} threads, {simd}",
        "matmul": f"{facts['matmul_gflops']:.0f} GFLOP/s (float32, measured)",
        "memory": f"{facts['stream_gbs']:.1f} GB/s (stream triad, measured)",
        "kernels": f"{cached['files']} cached files, {output.size(cached['bytes'])}, in {cached['folder']}",
    }
    for name, value in lines.items():
        console.print(Text.assemble((f"{name:10}", "bold"), value))
    table = output.table(("op", "device", "dtypes", "backend", "why"), title="\nBackends")
    for op, device, dtypes, chosen, reason in _merged(facts["backends"]):
        table.add_row(op, device, ", ".join(dtypes), chosen, reason)
    console.print(table)
    _print_warnings(facts["warnings"], console)
    if not facts["warnings"]:
        console.print("No problems found.")


def _print_warnings(warnings: list[str], console: Any) -> None:
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _merged(rows: list[dict[str, str]]) -> list[tuple[str, str, list[str], str, str]]:
    """Rows that differ in the dtype alone become one."""
    merged: dict[tuple[str, str, str], tuple[list[str], str]] = {}
    for row in rows:
        dtypes, _ = merged.setdefault((row["op"], row["device"], row["backend"]), ([], row["reason"]))
        dtypes.append(row["dtype"])
    return [(op, device, dtypes, chosen, why) for (op, device, chosen), (dtypes, why) in merged.items()]

"""Write the tables that are made elsewhere into the pages that show them, each between its two markers.

The table of architectures comes from the registry; the table of measurements in README.md is that of
docs/benchmarks.md.

From the checkout's folder:

    python tools/readme_table.py            write
    python tools/readme_table.py --check    only say whether the tables are up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from tidegate import registry
from tidegate.bench import mixers
from tidegate.cli import output

ROOT = Path(__file__).parents[1]
README, MIXERS, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "mixers.md", ROOT / "docs" / "benchmarks.md"
ARCHITECTURES = ("<!-- architectures: tools/readme_table.py -->", "<!-- /architectures -->")
MEASURED = ("<!-- measured: docs/benchmarks.md, copied by tools/readme_table.py -->", "<!-- /measured -->")
SUMMARY = ("<!-- summary -->", "<!-- /summary -->")
DIM = 256


def architecture_table() -> str:
    """All registered mixers as a Markdown table."""
    rows = [
        f"| name | family | source | state per sequence, dim {DIM} | exceptions to the contract |",
        "|---|---|---|---|---|",
    ]
    for name in registry.names():
        info = registry.info(name)
        link = f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else ""
        source = ", ".join(part for part in (info.title, link) if part) or info.paper
        exceptions = "; ".join(f"{prop.replace('_', ' ')}: {reason}" for prop, reason in info.exceptions.items())
        cells = (f"`{name}`", registry.FAMILIES[info.family][0], source, _state(name), exceptions or "none")
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _state(name: str) -> str:
    cost = mixers.cost(name, DIM)
    grows = cost.state_bytes_per_token
    return f"{output.size(grows)} for every token" if grows else output.size(cost.state_bytes)


def parts(text: str, markers: tuple[str, str]) -> tuple[str, str, str]:
    """What stands before, between and after the markers' lines. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(f"{markers[0]}\n")
    table, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"page: wanted a place for the table, the lines {markers[0]} and {markers[1]}")
    return before, table.strip("\n"), after


def with_table(text: str, table: str, markers: tuple[str, str]) -> str:
    """The page with `table` between the markers."""
    before, _, after = parts(text, markers)
    return f"{before}{markers[0]}\n\n{table}\n\n{markers[1]}{after}"


def pages() -> dict[Path, str]:
    """Every page with such a table, as it should be."""
    table = architecture_table()
    measured = parts(BENCHMARKS.read_text(encoding="utf-8"), SUMMARY)[1]
    readme = with_table(README.read_text(encoding="utf-8"), table, ARCHITECTURES)
    return {
        README: with_table(readme, measured, MEASURED),
        MIXERS: with_table(MIXERS.read_text(encoding="utf-8"), table, ARCHITECTURES),
    }


def main(arguments: list[str]) -> int:
    """Write or check all pages; 1 if `--check` finds one out of date."""
    stale = False
    for page, wanted in pages().items():
        if page.read_text(encoding="utf-8") == wanted:
            continue
        if "--check" in arguments:
            stale = True
            print(f"{page.relative_to(ROOT)}: a table is out of date; python tools/readme_table.py writes it")
        else:
            page.write_text(wanted, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Write the table of architectures into README.md and docs/mixers.md, between its two markers.

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
PAGES = (ROOT / "README.md", ROOT / "docs" / "mixers.md")
BEGIN, END = "<!-- architectures: tools/readme_table.py -->", "<!-- /architectures -->"
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


def with_table(text: str, table: str) -> str:
    """The page with `table` between the markers. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: wanted a place for the table, the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Write or check all pages; 1 if `--check` finds one out of date."""
    table = architecture_table()
    stale = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = with_table(text, table)
        if text == wanted:
            continue
        if "--check" in arguments:
            stale = True
            print(f"{page.relative_to(ROOT)}: the table is out of date; python tools/readme_table.py writes it")
        else:
            page.write_text(wanted, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: table written")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

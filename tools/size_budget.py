"""Print the lines of every file in src/tidegate and fail where one has outgrown its budget.

A file that is too long to read in one sitting has more than one subject: split it, do not raise the budget.

    python tools/size_budget.py [folder with the package, default src/tidegate]
"""

from __future__ import annotations

import sys
from pathlib import Path

BUDGETS = {"mixers": 250, "ops": 400}
ANY = 600


def budget(file: Path) -> int:
    """Lines allowed for a file, given relative to the package.

    >>> budget(Path("mixers/gla.py")), budget(Path("ops/scan/parallel.py")), budget(Path("state.py"))
    (250, 400, 600)
    """
    return BUDGETS.get(file.parts[0], ANY)


def main(package: Path) -> int:
    """Print the table; 1 if a file is over its budget."""
    folders: dict[str, int] = {}
    over = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        lines = len(file.read_text(encoding="utf-8").splitlines())
        folder = relative.parts[0] if len(relative.parts) > 1 else "."
        folders[folder] = folders.get(folder, 0) + lines
        if lines > budget(relative):
            over.append(f"{file}: {lines} lines, the budget is {budget(relative)}")
        elif lines > 0.9 * budget(relative):
            print(f"nearly full: {file}: {lines} of {budget(relative)} lines")
    for folder, lines in folders.items():
        print(f"{folder:12}{lines:7,}")
    print(f"{'all':12}{sum(folders.values()):7,}")
    for line in over:
        print(f"error: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "src/tidegate")))

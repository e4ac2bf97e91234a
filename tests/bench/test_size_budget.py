from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "size_budget.py"


def budget(package: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), str(package)], capture_output=True, text=True)


def write(file: Path, lines: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("pass\n" * lines)


def test_within_budget(tmp_path):
    write(tmp_path / "mixers" / "a.py", 250)
    write(tmp_path / "ops" / "scan" / "b.py", 400)
    write(tmp_path / "c.py", 600)
    done = budget(tmp_path)
    assert done.returncode == 0
    assert "1,250" in done.stdout


def test_over_budget(tmp_path):
    write(tmp_path / "mixers" / "a.py", 251)
    write(tmp_path / "ops" / "scan" / "b.py", 401)
    write(tmp_path / "c.py", 601)
    done = budget(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 3

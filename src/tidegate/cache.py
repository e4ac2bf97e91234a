"""Where tidegate keeps what it can make again: tokenised texts, the source of generated kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TIDEGATE_CACHE, or ~/.cache/tidegate. Safe to delete at any time."""
    return Path(os.environ.get("TIDEGATE_CACHE") or Path.home() / ".cache" / "tidegate")

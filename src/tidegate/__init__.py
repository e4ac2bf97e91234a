"""tidegate: recurrent and linear-time sequence models under one state contract, fast on an ordinary CPU."""

import importlib
from typing import TYPE_CHECKING, Any

from tidegate.backend import backend

if TYPE_CHECKING:
    from tidegate import mixers, ops, registry
    from tidegate.models.language import LanguageModel
    from tidegate.models.recurrent import RNN
    from tidegate.registry import register
    from tidegate.segments import Segments
    from tidegate.state import State

__version__ = "0.1.0"
__all__ = ["RNN", "LanguageModel", "Segments", "State", "backend", "mixers", "ops", "register", "registry"]

# Where a name lives. Each is imported when it is first asked for: PyTorch alone takes a second, which `tidegate --help`
# should not cost, and the model pulls in every mixer, for which who only wants an op should not wait.
_HOMES = {
    "LanguageModel": "tidegate.models.language",
    "RNN": "tidegate.models.recurrent",
    "Segments": "tidegate.segments",
    "State": "tidegate.state",
    "register": "tidegate.registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in ("mixers", "ops", "registry"):
        return importlib.import_module(f"tidegate.{name}")
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")

"""tidegate: recurrent and linear-time sequence models under one state contract, fast on an ordinary CPU."""

from typing import TYPE_CHECKING, Any

from tidegate import mixers, ops, registry
from tidegate.backend import backend
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

if TYPE_CHECKING:
    from tidegate.models.language import LanguageModel

__version__ = "0.1.0"
__all__ = ["LanguageModel", "Segments", "State", "backend", "mixers", "ops", "register", "registry"]


def __getattr__(name: str) -> Any:
    # The model pulls in every mixer; who only wants an op should not wait for them.
    if name == "LanguageModel":
        from tidegate.models.language import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")

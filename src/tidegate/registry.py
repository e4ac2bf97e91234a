"""Names to classes, with what the tools need to know about each: paper, family, tiny arguments, declared exceptions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn

Class = TypeVar("Class", bound=type[nn.Module])

# What one step costs per element of the recurrent state, in floating-point operations: decay, write and read.
FAMILIES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "attention": ("softmax attention", 4),
        "linear_attention": ("decayed outer products", 5),
        "delta": ("delta rule", 9),
        "scan": ("diagonal linear recurrence", 4),
        "selective_scan": ("selective state space", 16),
        "cell": ("nonlinear cell", 8),
        "convolution": ("convolution over time", 2),
    }
)

# Properties of the contract suite that an architecture may be excused from, with a reason.
PROPERTIES = frozenset(
    {"causality", "streaming", "constant_state", "double_backward", "threads", "drift", "extreme_gates", "vmap"}
)


@dataclass(frozen=True)
class Info:
    """What the registry knows of one architecture: its class, and what was given to `register`."""

    name: str
    cls: type[nn.Module]
    family: str
    paper: str
    title: str = ""
    arxiv: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether it reads from the left and a state carries it on, as language models and generation need it."""
        return not {"causality", "streaming"} & set(self.exceptions)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Constructor arguments besides `dim`, `device` and `dtype`, with their defaults."""
        parameters = inspect.signature(self.cls.__init__).parameters
        return {name: p for name, p in parameters.items() if name not in ("self", "dim", "device", "dtype")}


_mixers: dict[str, Info] = {}
_discovered = False
_discovery = threading.RLock()


def register(
    name: str,
    *,
    family: str,
    paper: str,
    title: str = "",
    arxiv: str = "",
    tiny: Mapping[str, Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> Callable[[Class], Class]:
    """Class decorator: make a mixer known as `name` and thereby part of the contract suite, the model and the tools.

    `paper` is the slug used by `tidegate reproduce`; `tiny` the constructor arguments that tests use with a small
    `dim`; `exceptions` maps a property of the contract suite to the reason why the architecture cannot have it.
    Raises ValueError for a name already taken, an unknown family or an unknown property.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: seen {family!r}, wanted one of {', '.join(FAMILIES)}")
    if unknown := set(exceptions or {}) - PROPERTIES:
        raise ValueError(f"exceptions: unknown properties {sorted(unknown)}, wanted some of {sorted(PROPERTIES)}")
    if unexplained := [key for key, reason in (exceptions or {}).items() if not reason.strip()]:
        raise ValueError(f"exceptions: {', '.join(unexplained)} lacks the reason why the architecture cannot have it")

    def decorate(cls: Class) -> Class:
        taken = _mixers.get(name)
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"name: {name!r} is already registered by {taken.cls.__module__}.{taken.cls.__qualname__}")
        _mixers[name] = Info(
            name, cls, family, paper, title, arxiv, dict(tiny or {}), dict(presets or {}), dict(exceptions or {})
        )
        return cls

    return decorate


def names(*, streaming: bool = False) -> list[str]:
    """All registered mixers, sorted; with `streaming` those that a language model takes."""
    _discover()
    return sorted(name for name, known in _mixers.items() if known.streams or not streaming)


def info(name: str) -> Info:
    """What is known of a mixer. Raises ValueError naming the closest registered one."""
    _discover()
    if name not in _mixers:
        raise ValueError(f"mixer: there is no {name!r}{did_you_mean(name, _mixers)}; `tidegate list` shows all")
    return _mixers[name]


def exceptions_of(module: nn.Module) -> Mapping[str, str]:
    """The exceptions that the module's class was registered with; none for one that is not registered."""
    return next((known.exceptions for known in _mixers.values() if known.cls is type(module)), {})


def build(name: str, dim: int, **options: Any) -> nn.Module:
    """Construct a mixer by name, as `build("gla", dim=64, num_heads=2)`.

    Raises ValueError for an unknown name, option or preset, naming the closest valid one.
    """
    known = info(name)
    check_options(name, options)
    if preset := options.pop("preset", None):
        options = {**known.presets[preset], **options}
    return known.cls(dim, **options)


def check_options(name: str, options: Iterable[str] | Mapping[str, Any]) -> None:
    """Raise ValueError if the mixer's constructor does not take one of `options`; nothing is built."""
    known = info(name)
    valid = [*known.options, "device", "dtype", "preset"]
    for option in options:
        if option not in valid:
            raise ValueError(
                f"{name}: no option {option!r}{did_you_mean(option, valid)}; it takes {', '.join(known.options)}"
            )
    if isinstance(options, Mapping) and (preset := options.get("preset")) and preset not in known.presets:
        hint = did_you_mean(str(preset), known.presets)
        raise ValueError(f"{name}: no preset {preset!r}{hint}; it has {', '.join(known.presets) or 'none'}")


def did_you_mean(seen: str, valid: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest valid name, or nothing."""
    close = difflib.get_close_matches(seen, list(valid), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _discover() -> None:
    # Every file in mixers/ registers itself when imported, so adding an architecture is adding one file.
    global _discovered
    with _discovery:
        if _discovered:
            return
        _discovered = True  # a mixer may ask for names() while it is being imported
        try:
            package = importlib.import_module("tidegate.mixers")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"tidegate.mixers.{module.name}")
        except BaseException:
            _discovered = False  # else the next call would pass off half the registry as all of it
            raise

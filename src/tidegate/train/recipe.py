"""Recipes: what is trained, on what, and how. YAML in, checked to the last key before anything heavy starts."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tidegate import registry
from tidegate.state import write_atomically

_OWN_ARGUMENTS = ("vocab_size", "dim", "layers", "device", "dtype")
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class Model(_Section):
    """The network. `layers` is a number of layers of `mixer`, a pattern, or a list of names and {name: options}."""

    mixer: str = "gla"
    layers: int | str | list[str | dict[str, dict[str, Any]]] = 4
    dim: Count = 256
    options: dict[str, Any] = Field(default_factory=dict, description="constructor options of `mixer`")
    network: dict[str, Any] = Field(default_factory=dict, description="further options of LanguageModel")

    def layer_list(self) -> str | list[Any]:
        """What `LanguageModel` takes as `layers`."""
        if isinstance(self.layers, int):
            return [(self.mixer, dict(self.options)) if self.options else self.mixer] * self.layers
        if isinstance(self.layers, str):
            return self.layers
        return [layer if isinstance(layer, str) else next(iter(layer.items())) for layer in self.layers]


class Data(_Section):
    """The text. Without `text`, the English that is installed with the package."""

    text: str | None = None
    field: str = "text"
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.05


class Training(_Section):
    """The optimisation. `batch_size` is the number of rows per step over all devices and accumulated parts."""

    steps: Count = 1000
    batch_size: Count = 16
    length: Count = 256
    learning_rate: Positive = 2e-3
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: Annotated[int, Field(ge=0)] = 50
    decay: Share = 0.3
    minimum: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    devices: Count = 1
    log_every: Count = 1
    evaluate_every: Count = 200
    evaluate_tokens: Count = 100_000
    patience: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Count = 200

    @model_validator(mode="after")
    def _divisible(self) -> Training:
        parts = self.devices * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size: {self.batch_size} rows cannot be shared by devices * accumulate = {parts}; "
                f"take {-(-self.batch_size // parts) * parts}"
            )
        return self


class Sample(_Section):
    """The text written at the end of a run."""

    prompt: str = "The "
    tokens: Annotated[int, Field(ge=0)] = 400
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class Recipe(_Section):
    """A complete training run.

    >>> Recipe.parse({"training": {"stesp": 10}})
    Traceback (most recent call last):
    ValueError: training.stesp: there is no such key, did you mean 'steps'?
    """

    name: str = Field("run", pattern=r"^[\w.-]+$")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    sample: Sample = Field(default_factory=Sample)

    @staticmethod
    def parse(content: Any, origin: str = "") -> Recipe:
        """Check a nested mapping. Raises ValueError with one line: where, what is wrong, what is right."""
        prefix = f"{origin}: " if origin else ""
        if not isinstance(content, Mapping):
            raise ValueError(f"{prefix}seen {type(content).__name__}, wanted sections such as `model:` and `training:`")
        try:
            recipe = Recipe.model_validate(content)
        except ValidationError as error:
            raise ValueError(prefix + "; ".join(dict.fromkeys(_line(e) for e in error.errors()))) from None
        try:
            _check_model(recipe.model)
        except ValueError as error:
            raise ValueError(f"{prefix}model: {error}") from None
        return recipe

    @staticmethod
    def load(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a YAML file; `overrides` maps paths such as "training.steps" to values that win over the file's.

        Raises FileNotFoundError for a missing file, ValueError for one that is no valid recipe.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe file")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        return Recipe.parse(merged({} if content is None else content, overrides or {}), str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the complete recipe, defaults included."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(path, text.encode())

    def build_model(self, vocab_size: int) -> Any:
        """The untrained `LanguageModel`; its weights depend on the seed alone."""
        import torch

        from tidegate.models.language import LanguageModel

        torch.manual_seed(self.seed)
        layers: Any = self.model.layer_list()
        return LanguageModel(vocab_size, self.model.dim, layers, **self.model.network)


def merged(content: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of a nested mapping with the values at dotted paths replaced.

    >>> merged({"training": {"steps": 5}}, {"training.steps": 7, "seed": 2})
    {'training': {'steps': 7}, 'seed': 2}
    """
    if not isinstance(content, Mapping):
        return content
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for path, value in overrides.items():
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            place[parent] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[parent]
        place[last] = value
    return result


def _line(error: Any) -> str:
    """One pydantic error as `training.steps: what is wrong`."""
    place = list(error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in place[:-1]:
            section = section.model_fields[part].annotation
        hint = registry.did_you_mean(str(place[-1]), section.model_fields)
        return f"{'.'.join(map(str, place))}: there is no such key{hint}"
    if place[:2] == ["model", "layers"]:
        return f"model.layers: wanted a number, a pattern or a list of mixer names, seen {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{'.'.join(map(str, place))}.{message}" if place else message
    return f"{'.'.join(map(str, place))}: wanted {message}, seen {error['input']!r}"


def _check_model(model: Model) -> None:
    """Every mixer name and option, and that the constructors take these values; no weight is allocated."""
    from tidegate.models.language import LanguageModel
    from tidegate.models.layers import parse

    if not isinstance(model.layers, int) and model.options:
        raise ValueError("options: these belong to `mixer`; with a list of layers write `- name: {option: value}`")
    layers = parse(model.layer_list())
    known = [name for name in inspect.signature(LanguageModel).parameters if name not in _OWN_ARGUMENTS]
    for option in model.network:
        if option not in known:
            hint = registry.did_you_mean(option, known)
            raise ValueError(f"network: there is no option {option!r}{hint}; it takes {', '.join(known)}")
    try:
        # The meta device has shapes but no memory; an initialisation that needs values stops there, which is no error.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            LanguageModel(256, model.dim, layers, **model.network, device="meta")
    except TypeError as error:
        raise ValueError(f"options: of the wrong type ({error})") from None

"""`tidegate train`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

_FLAGS = {  # option -> place in the recipe
    "text": "data.text",
    "mixer": "model.mixer",
    "layers": "model.layers",
    "dim": "model.dim",
    "steps": "training.steps",
    "batch_size": "training.batch_size",
    "length": "training.length",
    "learning_rate": "training.learning_rate",
    "tokenizer": "data.tokenizer",
    "vocab_size": "data.vocab_size",
    "devices": "training.devices",
    "seed": "seed",
    "name": "name",
}


def train(
    text: Annotated[
        str | None,
        typer.Argument(help="A text file, a JSONL file, or a directory of them. Default: English installed with it."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A YAML file; flags win over it.")] = None,
    mixer: Annotated[str | None, typer.Option("--mixer", help="An architecture of `tidegate list`.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="How many, or a pattern of mixers.")] = None,
    dim: Annotated[int | None, typer.Option("--dim", help="Width of the model.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows per step, over all devices.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens per row.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", "--learning-rate", help="Its peak.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="bytes, or bpe learnt from the text.")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Tokens of bpe.")] = None,
    devices: Annotated[int | None, typer.Option("--devices", help="Training processes.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the weights, the order of the rows, the sample.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of the recipe, as training.clip=0.5; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: runs/NAME-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its checkpoint.")] = False,
) -> None:
    """Train a language model on your text, or on English that is installed with the package.

    Ends with the held-out score beside an n-gram model's, a picture of the losses and a sample.
    """
    options = dict(locals())
    given = {place: options[flag] for flag, place in _FLAGS.items() if options[flag] is not None}
    if layers is not None and layers.strip().isdigit():
        given["model.layers"] = int(layers)
    if mixer is not None and recipe is not None:
        given["model.options"] = {}  # the recipe's options belong to the recipe's mixer
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: wanted KEY=VALUE, as in --set training.clip=0.5")
        given[key.strip()] = _value(setting, value)
    if resume and out is None:
        raise ValueError("--resume: name the folder of the run to continue with --out")

    from tidegate.cli.output import console
    from tidegate.train.recipe import Recipe, merged
    from tidegate.train.run import BASELINE_ORDER
    from tidegate.train.run import train as run

    if resume and recipe is None:
        assert out is not None
        if not (out / "recipe.yaml").is_file():
            raise FileNotFoundError(f"{out}: no recipe.yaml here, so there is nothing to resume; name a run's folder")
        recipe = out / "recipe.yaml"
    chosen = Recipe.load(recipe, given) if recipe else Recipe.parse(merged({}, given))
    folder = out or Path("runs") / f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}"
    screen = console()
    result = run(chosen, folder, resume=resume, console=screen)
    better = "better" if result.bits_per_byte < result.baseline else "worse"
    difference = abs(result.baseline - result.bits_per_byte)
    done = f"steps {result.first_step + 1:,} to {result.step:,}" if result.first_step else f"{result.step:,} steps"
    rows = [
        ("held-out text", f"{result.bits_per_byte:.3f} bits per byte, perplexity {result.perplexity:.2f} per token"),
        (f"order-{BASELINE_ORDER} n-gram", f"{result.baseline:.3f} bits per byte on the same bytes"),
        ("", f"the model is {difference:.3f} bits per byte {better}"),
        ("training", f"{done} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s"),
        ("picture", str(result.picture)),
        ("run", str(result.folder)),
    ]
    screen.print()
    for what, value in rows:
        screen.print(f"{what:<16}{value}", soft_wrap=True, markup=False)


def _value(setting: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {setting}: the value is not valid YAML") from None

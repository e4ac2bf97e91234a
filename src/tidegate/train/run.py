"""A training run from recipe to result: its folder, its data, the fit, the scores, the picture, the sample."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.state import write_atomically
from tidegate.train.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from tidegate.tasks.language.data import Corpus

BASELINE_ORDER = 3  # bytes of context
BASELINE_BYTES = 64 << 20  # the n-gram model reads at most this much of the text to learn
_FREE_TO_CHANGE = {"training.steps", "training.devices", "training.evaluate_every", "training.checkpoint_every"}


@dataclass(frozen=True)
class Result:
    """What a run came to. Scores are of the whole held-out text, of the best model seen (the one that is saved)."""

    folder: Path
    bits_per_byte: float
    perplexity: float
    baseline: float  # bits per byte of the n-gram model on the same bytes
    step: int
    first_step: int  # where this call began: 0, or the checkpoint it resumed
    best_step: int
    stopped_early: bool
    tokens_per_second: float
    seconds: float  # from first_step to step: compiling, evaluating and saving included
    picture: Path
    sample: str


def train(
    recipe: Recipe | Mapping[str, Any],
    folder: str | os.PathLike[str],
    resume: bool = False,
    console: Console | None = None,
) -> Result:
    """Train into `folder`; with `resume`, continue from its newest intact checkpoint, bit for bit.

    `console` (rich) shows progress and the sample as it is written; None is silent.
    Raises ValueError or OSError with one line naming cause and fix; whatever was saved before stays intact.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    folder, d, t = Path(folder), recipe.data, recipe.training
    text = None if d.text is None else str(Path(d.text).expanduser().resolve())
    recipe = recipe.model_copy(update={"data": d.model_copy(update={"text": text})})
    _check_folder(folder, recipe, resume)
    say = _silent if console is None else functools.partial(console.print, soft_wrap=True, markup=False)

    from tidegate.tasks.language.data import Rows, prepare

    corpus = prepare(d.text, tokenizer=d.tokenizer, vocab_size=d.vocab_size, field=d.field, held_out=d.held_out)
    Rows(corpus.train, t.length, corpus.tokenizer.boundary, recipe.seed)  # too short a text is found out here
    say(corpus.describe())
    model = recipe.build_model(corpus.tokenizer.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    say(
        f"{_layers(recipe)}, dim {recipe.model.dim}: {parameters:,} parameters; {t.steps:,} steps of {t.batch_size} "
        f"rows x {t.length} tokens; into {folder}"
    )

    from tidegate.train.callbacks import warn
    from tidegate.train.checkpoint import newest_good
    from tidegate.train.fit import fit
    from tidegate.train.processes import workers

    checkpoint = newest_good(folder, warn) if resume else None
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    corpus.tokenizer.save(folder)
    arguments = {
        "folder": str(folder),
        "corpus": str(corpus.folder),
        "checkpoint": str(checkpoint) if checkpoint else None,
    }
    if resume:
        say(f"continuing from {checkpoint.name}" if checkpoint else "no checkpoint yet: from the start")
    begin = time.perf_counter()
    try:
        with workers(t.devices, arguments) as place:
            fitted = fit(recipe, folder, corpus, place, checkpoint, console)
    except KeyboardInterrupt:
        warn(f"stopped by hand; `tidegate train --out {folder} --resume` continues from the last checkpoint")
        raise
    seconds = time.perf_counter() - begin
    if fitted.stopped_early:
        say(f"stopped at step {fitted.step}: no better score since step {fitted.best_step}")
    return _finish(recipe, folder, corpus, fitted, seconds, console)


def baseline_bits(corpus: Corpus, held_out: Any = None, order: int = BASELINE_ORDER) -> float:
    """Bits per byte of a byte n-gram model of the run's own text, on its held-out tokens or on others."""
    from tidegate.tasks.language.metrics import byte_stream
    from tidegate.tasks.language.ngram import NGram

    learnt = byte_stream(corpus.train, corpus.tokenizer, limit=BASELINE_BYTES)
    return NGram.fit(learnt, order).bits_per_byte(
        byte_stream(corpus.held_out if held_out is None else held_out, corpus.tokenizer)
    )


def _finish(recipe: Recipe, folder: Path, corpus: Corpus, fitted: Any, seconds: float, console: Any) -> Result:
    from tidegate.models.language import LanguageModel
    from tidegate.tasks.language.metrics import evaluate
    from tidegate.train.metrics_file import draw_losses, read_metrics

    model = LanguageModel.load(folder)
    score = evaluate(model, corpus.held_out, corpus.tokenizer)
    baseline = baseline_bits(corpus)
    name = f"order-{BASELINE_ORDER} byte n-gram"
    picture = folder / "loss.png"
    draw_losses(read_metrics(folder / "metrics.csv"), picture, f"{recipe.name}: {_layers(recipe)}", (name, baseline))
    sample = _sample(recipe, folder, model, corpus, console)
    return Result(
        folder,
        score.bits_per_byte,
        score.perplexity,
        baseline,
        fitted.step,
        fitted.first_step,
        fitted.best_step,
        fitted.stopped_early,
        fitted.tokens_per_second,
        seconds,
        picture,
        sample,
    )


def _sample(recipe: Recipe, folder: Path, model: Any, corpus: Corpus, console: Any) -> str:
    """A continuation of the recipe's prompt, shown as it is written and kept in sample.txt."""
    from tidegate.infer.text import TextGeneration

    s, text = recipe.sample, recipe.sample.prompt
    say = _silent if console is None else functools.partial(console.print, end="", markup=False, soft_wrap=True)
    if s.tokens:
        say(f"\nsample\n{text}")
        options: dict[str, Any] = {"temperature": s.temperature, "top_p": s.top_p, "seed": recipe.seed}
        for piece in TextGeneration(model, corpus.tokenizer, s.prompt, s.tokens, **options):
            text += piece
            say(piece)
        say("\n")
    write_atomically(folder / "sample.txt", text.encode())
    return text


def _silent(*_: Any, **__: Any) -> None:
    """Says nothing."""


def _layers(recipe: Recipe) -> str:
    m = recipe.model
    if isinstance(m.layers, int):
        return f"{m.layers} layers of {m.mixer}"
    return (
        m.layers
        if isinstance(m.layers, str)
        else ", ".join(x if isinstance(x, str) else next(iter(x)) for x in m.layers)
    )


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, wanted a folder for the run; name another one")
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: is not empty; name another folder, or continue what is there with --resume")
        return
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{folder}: no recipe.yaml here, so there is nothing to resume; name a run's folder")
    before = _flat(Recipe.load(folder / "recipe.yaml").model_dump(mode="json"))
    changed = [key for key, value in _flat(recipe.model_dump(mode="json")).items() if before.get(key) != value]
    if fixed := [key for key in changed if key not in _FREE_TO_CHANGE and not key.startswith("sample.")]:
        raise ValueError(
            f"{fixed[0]}: was {before.get(fixed[0])!r} in {folder}/recipe.yaml; a resumed run keeps its recipe, only "
            f"{', '.join(sorted(_FREE_TO_CHANGE))} may change"
        )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping) and key not in ("options", "network")
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat

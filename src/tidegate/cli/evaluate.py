"""`tidegate evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tidegate.tasks.language.data import Corpus


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    text: Annotated[
        str | None, typer.Argument(help="A text file, JSONL file or directory. Default: the run's held-out text.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Where the text is in a JSONL line.")] = "text",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Documents read side by side.")] = 16,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens per window; the state is carried on.")] = 512,
    ngram: Annotated[bool, typer.Option(help="Also score an n-gram model learnt from the run's own text.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Score a trained model on a text, in bits per byte and perplexity.

    Documents of any length are read to their end with the state carried along, in constant memory.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run}: no trained model here (config.json is missing); name a run's folder")

    from tidegate.cli.output import console, print_json
    from tidegate.models.language import LanguageModel
    from tidegate.tasks.language import data, metrics
    from tidegate.tasks.language.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run)
    model = LanguageModel.load(run)
    own = _own_corpus(run) if text is None or ngram else None
    if text is None and own is None:
        raise FileNotFoundError(f"{run}: the text it was trained on is gone; name a text to evaluate")
    corpus = own if text is None else data.prepare(text, tokenizer=tokenizer, field=field, held_out=1.0)
    assert corpus is not None
    score = metrics.evaluate(model, corpus.held_out, tokenizer, rows=rows, length=length, on_window=_progress(corpus))
    result: dict[str, Any] = {
        "text": text or "held out",
        "bytes": score.bytes,
        "documents": corpus.summary["held_out_documents"],
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
    }
    if ngram and own is not None:
        from tidegate.train.run import BASELINE_ORDER, baseline_bits

        result[f"ngram_{BASELINE_ORDER}_bits_per_byte"] = baseline_bits(own, corpus.held_out)
    if json:
        print_json(result)
        return
    screen = console()
    screen.print(f"{result['text']}: {score.bytes:,} bytes in {result['documents']:,} documents", soft_wrap=True)
    screen.print(f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f} per token")
    for name, value in result.items():
        if name.startswith("ngram"):
            screen.print(
                f"{value:.4f} bits per byte by an order-{name.split('_')[1]} n-gram model of the run's own text"
            )
    if metrics.growing_state(model):
        screen.print(f"(this model's state grows with the text, so its context was cut to windows of {length} tokens)")


def _own_corpus(run: Path) -> Corpus | None:
    """The text the run learnt from, if it is still there."""
    from tidegate.tasks.language.data import prepare
    from tidegate.train.recipe import Recipe

    try:
        d = Recipe.load(run / "recipe.yaml").data
        return prepare(d.text, tokenizer=d.tokenizer, vocab_size=d.vocab_size, field=d.field, held_out=d.held_out)
    except (OSError, ValueError):
        return None


def _progress(corpus: Corpus) -> Any:
    """A percentage on a terminal's standard error; nothing into a file."""
    if not sys.stderr.isatty():
        return None
    total, done = max(len(corpus.held_out), 1), 0

    def show(tokens: int) -> None:
        nonlocal done
        done += tokens
        sys.stderr.write(f"\r{100 * done // total}% \r" if done < total - 1 else "\r     \r")
        sys.stderr.flush()

    return show

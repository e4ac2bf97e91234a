"""A small text and a small recipe; every run here takes seconds."""

import random

import pytest

TEXT = "the tide comes in and goes out of gates with water that turns at noon while boats wait for wind"
WORDS = TEXT.split()
BASE = {
    "name": "tiny",
    "model": {"mixer": "gla", "layers": 2, "dim": 16, "options": {"num_heads": 2}},
    "training": {
        "steps": 12,
        "batch_size": 4,
        "length": 16,
        "warmup": 2,
        "evaluate_every": 6,
        "evaluate_tokens": 600,
        "checkpoint_every": 4,
    },
    "sample": {"tokens": 8, "prompt": "the "},
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A JSONL file of short documents."""
    import json

    rng = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 25))) for _ in range(300)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture
def recipe(text):
    """`recipe(**{"training.steps": 5})`: the small recipe with changes."""
    from tidegate.train.recipe import Recipe, merged

    return lambda changes=None: Recipe.parse(merged(BASE, {"data.text": str(text), **(changes or {})}))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TIDEGATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()

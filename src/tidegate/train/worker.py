"""A further training process; started by `tidegate.train.processes`, never by hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Train as the rank that the argument names; an error ends in one line and exit code 1."""
    from tidegate.memory import keep_freed_memory
    from tidegate.tasks.language.data import open_corpus
    from tidegate.train.fit import fit
    from tidegate.train.module import Diverged
    from tidegate.train.processes import Place
    from tidegate.train.recipe import Recipe

    keep_freed_memory()
    content = json.loads(sys.argv[1])
    place = Place(content["rank"], content["world"], content["port"])
    folder, checkpoint = Path(content["folder"]), content["checkpoint"]
    try:
        recipe = Recipe.load(folder / "recipe.yaml")
        corpus = open_corpus(Path(content["corpus"]))
        print("ready", flush=True)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads standard output from here on
        fit(recipe, folder, corpus, place, checkpoint and Path(checkpoint), None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Diverged:  # seen by every process alike, and told by rank 0
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"process {place.rank}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

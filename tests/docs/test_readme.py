"""README.md: its table is the registry's, its commands exist, its promises have a place."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.docs import pages
from tidegate import registry

README = (pages.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", pages.ROOT / "tools" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_registry_and_of_the_benchmarks(generator: ModuleType):
    for page, wanted in generator.pages().items():
        assert page.read_text(encoding="utf-8") == wanted, f"{page.name}: run `python tools/readme_table.py`"


def test_a_page_without_a_place_for_the_table_is_an_error(generator: ModuleType):
    with pytest.raises(ValueError, match="wanted a place for the table"):
        generator.with_table("# A page\n", "| a |", generator.ARCHITECTURES)


def test_every_mixer_has_an_entry_in_the_api():
    api = (pages.ROOT / "docs" / "api" / "mixers.md").read_text(encoding="utf-8")
    for name in registry.names():
        cls = registry.info(name).cls
        assert f"::: {cls.__module__}.{cls.__qualname__}\n" in api, f"docs/api/mixers.md: {name} is missing"


def test_the_python_example_is_short():
    first = next(block for block in pages.blocks(pages.ROOT / "README.md") if block.language == "python")
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 15


def test_every_command_is_in_the_tour():
    from tidegate.cli.main import COMMANDS

    for name in COMMANDS:
        assert f"tidegate {name}" in README


def test_the_named_folders_exist():
    layout = README.partition("## Layout")[2].partition("\n## ")[0]
    for name in re.findall(r"^\| `([\w./]+)`", layout, re.M):
        assert (pages.ROOT / name).exists() or (pages.ROOT / "src" / "tidegate" / name).exists(), name


def test_families_and_exceptions_are_explained():
    page = (pages.ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
    families, exceptions = page.partition("## Families")[2].split("## Exceptions")
    costs = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+)\b[^|]*\|$", families, re.M))
    assert costs == {name: str(cost) for name, (_, cost) in registry.FAMILIES.items() if name != "attention"}
    assert set(re.findall(r"^\| `(\w+)` \|", exceptions, re.M)) == registry.PROPERTIES

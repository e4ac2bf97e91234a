"""Every example in README.md and docs/ runs, every page is in the navigation, every link leads somewhere."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from tests.docs import pages

ROOT = pages.ROOT
PAGES = pages.pages()
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(autouse=True)
def _as_a_visitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Examples keep their files to themselves.
    monkeypatch.setenv("TIDEGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(page)], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_examples_run(page: Path, tmp_path: Path):
    pages.run(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_console_block_names_commands_and_options_that_exist(page: Path):
    from tidegate.cli.main import COMMANDS, _load

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in pages.blocks(page):
        for line in pages.commands(block) if block.language == "console" else ():
            where = f"{page.name}:{block.line}: {line}"
            program, *arguments = shlex.split(line)
            if program == "make":
                assert arguments[0] in targets, where
            if program == "tidegate":
                assert arguments[0] in COMMANDS, where
                known = {option for parameter in _load(arguments[0]).params for option in parameter.opts}
                assert {word for word in arguments if word.startswith("--")} <= known, where


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file(page: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name}: {target} does not exist"


def test_every_page_is_in_the_navigation():
    def files(entry: object) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        inner = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(files, inner))  # type: ignore[call-overload]

    # mkdocs.yml holds tags for Python objects in places; none of them matters here.
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("", lambda *_: None)
    nav = files(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=loader)["nav"])
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.name != "README.md"}
    assert written == {page for page in nav if not page.startswith("papers/")}


def test_the_table_of_keys_is_that_of_the_recipe():
    from tidegate.train.recipe import Recipe

    def flat(content: dict, prefix: str = "") -> dict:
        found = {}
        for key, value in content.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        return found

    page = (ROOT / "docs" / "train-on-your-text.md").read_text(encoding="utf-8")
    table = page.partition("All keys, with their defaults:")[2].partition("\n\n##")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| \S.* \|$", table, re.M)
    assert {key: yaml.safe_load(default) for key, default in rows} == flat(Recipe().model_dump(mode="json"))


def test_every_yaml_block_is_a_recipe():
    from tidegate.train.recipe import Recipe

    for page in PAGES:
        for block in pages.blocks(page):
            if block.language == "yaml":
                Recipe.parse(yaml.safe_load(block.code), f"{page.name}:{block.line}")


def test_the_mixer_of_the_example_keeps_the_contract(tmp_path: Path):
    from tests.contract import test_equality as contract
    from tests.contract.helpers import Subject
    from tidegate import registry

    def check(namespace: dict) -> None:
        info = registry.info("leaky-average")
        subject = Subject(info.name, info.cls, options=dict(info.tiny), exceptions=info.exceptions)  # type: ignore[arg-type]
        contract.test_any_split_is_the_whole(subject, 65)
        contract.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")
        contract.test_one_by_one_through_documents_and_padding(subject, "left")
        for dtype in (torch.float64, torch.float32):
            contract.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", dtype)

    pages.run(ROOT / "docs" / "add-a-mixer.md", tmp_path, before_leaving=check)


def test_every_api_entry_exists():
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"{page.name}: there is no {name}"


def test_every_paper_is_named():
    from tidegate.papers import papers

    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    for slug, paper in papers().items():
        assert f"| `{slug}` | [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}) |" in page


def test_verdicts_are_those_of_the_reports():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| \[([\w-]+)\]\(papers/\1/results\.md\) \| ([a-z ]+) \|", page, re.M))
    records = (ROOT / "docs" / "papers").glob("*/results.json")
    assert told == {path.parent.name: json.loads(path.read_text())["verdict"] for path in records}


def test_the_named_recipes_exist():
    for page in PAGES:
        for name in re.findall(r"recipes/[\w.-]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name} does not exist"

"""The front page and the guides: short, whole, their links and messages exist; test_snippets.py runs them."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from functools import cache

import pytest

from diffusers_ext.core.settings import flag_name
from diffusers_ext.eraser.recipe import EraserTraining
from tests.docs.snippets import PAGES, ROOT, snippets
from tests.eraser.real_model_defaults import REAL_MODEL_DEFAULTS

README, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
ERASER_PAGE = (ROOT / "docs" / "concept_eraser.md").read_text()
TOOL_PAGES = ("null_space_dreambooth", "golden_noise", "concept_eraser")
# Of diffusers; tests/hub sees it.
FOREIGN_MESSAGES = ("… is not one of the libraries Diffusers can load components from",)
# Of accelerate, and of every parser.
FOREIGN_FLAGS = {"--no-deps", "--dynamo_backend", "--help"}
EVERY_PAGE = pytest.mark.parametrize("page", [*PAGES, CHINESE], ids=lambda page: page.name)


@cache
def messages() -> tuple[str, ...]:
    """All strings of the library and of the scripts, with … for what is put into them."""
    found = []
    for folder in ("diffusers_ext", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", "") for part in node.values]
                    found.append("".join(p if isinstance(p, str) else "…" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 175


@pytest.mark.parametrize("front", [README, CHINESE], ids=lambda page: page.name)
def test_front_pages_show_every_tool_and_link_every_guide(front):
    text = front.read_text()
    assert sum(snippet.language == "python" for snippet in snippets(front)) >= 3
    for page in GUIDES:
        assert f"(docs/{page.name})" in text
    assert "(examples/README.md)" in text


@pytest.mark.parametrize("name", TOOL_PAGES)
def test_every_tool_page_has_its_parts(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for part in ("When not to use it", "How it works", "Settings", "Troubleshooting"):
        assert part in headings, part


@EVERY_PAGE
def test_named_files_exist(page):
    text = page.read_text()
    folders = "benchmarks|docs|examples|training|diffusers_ext|hub_cards|tests"
    for name in re.findall(rf"`(?:python )?((?:{folders})(?:/[\w/]*(?:\.\w+)?)?)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).is_file(), target


@EVERY_PAGE
def test_links_to_sections_have_a_heading(page):
    for target, section in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", page.read_text()):
        linked = (page.parent / target if target else page).read_text()
        headings = re.findall(r"^#+ (.*)$", linked, flags=re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@cache
def flags() -> frozenset[str]:
    """All flags of the scripts, examples and commands; many are made of the names of settings."""
    found = set()
    for folder in ("benchmarks", "diffusers_ext", "docs", "examples", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(f"--{node.value.removeprefix('--')}")
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(f"--{node.target.id}")
                elif isinstance(node, ast.keyword):
                    found.add(f"--{node.arg}")
    return frozenset(found)


@EVERY_PAGE
def test_named_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", page.read_text(encoding="utf-8")))
    known = flags() | FOREIGN_FLAGS
    assert not {flag for flag in named if not {flag, flag.replace("--no-", "--")} & known}


def test_the_table_of_the_eraser_settings_is_whole_and_right():
    rows = re.findall(r"^\| `(\w+)` \| `--(\w+)` \| (.*?) ?\| (.*?) ?\| ", ERASER_PAGE, re.MULTILINE)
    shown = lambda value: "" if value is None else str(value)
    expected = {
        one.name: (flag_name(one), shown(one.default), shown(REAL_MODEL_DEFAULTS[one.name]))
        for one in fields(EraserTraining)
    }
    assert {name: tuple(columns) for name, *columns in rows} == expected


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_headings_of_the_troubleshooting_are_messages(page):
    _, _, part = page.read_text().partition("## Troubleshooting\n")
    headings = re.findall(r"^### (.*)$", part.split("\n## ")[0], re.MULTILINE)
    assert len(headings) >= 10 or page.stem not in TOOL_PAGES
    for heading in headings:
        if heading in FOREIGN_MESSAGES:
            continue
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
        assert any(pattern.search(message) for message in messages()), heading

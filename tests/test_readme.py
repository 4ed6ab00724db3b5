"""The front page and the pages in docs: short, their Python compiles, their files and flags exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import diffusers_ext
from training.arguments import argument_names
from training.eraser_arguments import ERASER_GROUPS, parse_eraser_arguments, recipe_of
from training.eraser_recipe import EraserTraining


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ERASER_PAGE = (ROOT / "docs" / "concept_eraser.md").read_text()
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Script and arguments of every command that runs a Python file."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"]:
                yield words[2:]
            elif words[:1] == ["python"]:
                yield words[1:]


def messages() -> Iterator[str]:
    """All strings of the library and of the scripts, with … for what is put into them."""
    for folder in ("diffusers_ext", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", "") for part in node.values]
                    yield "".join(part if isinstance(part, str) else "…" for part in parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_readme_shows_every_tool_and_links_every_page():
    text = README.read_text()
    assert len(blocks(README, "python")) >= 3
    assert len(list(commands(README))) >= 7
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text


@EVERY_PAGE
def test_python_blocks_compile_and_import_public_names(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "diffusers_ext":
                assert {alias.name for alias in node.names} <= set(diffusers_ext.__all__)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@EVERY_PAGE
def test_flags_of_the_commands_exist(page):
    for script, *arguments in commands(page):
        assert (ROOT / script).is_file(), script
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if hasattr(module, "parse_args"):
            module.parse_args(arguments)  # exits for an unknown flag or a missing one
        else:
            assert not arguments, script


@EVERY_PAGE
def test_named_files_exist(page):
    text = page.read_text()
    folders = "benchmarks|docs|examples|training|diffusers_ext|hub_cards"
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


def test_the_table_of_the_eraser_settings_is_whole_and_right():
    rows = re.findall(
        r"^\| `(\w+)` \| `--(\w+)` \| (.*?) ?\| (.*?) ?\| ", ERASER_PAGE, re.MULTILINE
    )
    required = ("pretrained_model_name_or_path", "target_concept", "prompts_file", "output_dir")
    script = recipe_of(parse_eraser_arguments("", [f"--{name}=a" for name in required]))
    shown = lambda value: "" if value is None else str(value)
    expected = {
        field.name: (shown(field.default), shown(getattr(script, field.name)))
        for field in fields(EraserTraining)
    }
    assert {name: tuple(defaults) for name, _, *defaults in rows} == expected
    assert {flag for _, flag, *_ in rows} <= argument_names(ERASER_GROUPS)


def test_headings_of_the_troubleshooting_are_messages():
    headings = re.findall(r"^### (.*)$", ERASER_PAGE, re.MULTILINE)
    assert len(headings) >= 15
    known = list(messages())
    for heading in headings:
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
        assert any(pattern.search(message) for message in known), heading

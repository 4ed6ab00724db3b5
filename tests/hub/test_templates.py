"""The Python of the cards: it compiles, and what it imports and calls is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

import diffusers_ext
from diffusers_ext.hub.kinds import KINDS
from tests.hub.card_examples import VARIANTS, card_of

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str, changes: dict) -> list[str]:
    return BLOCK.findall(card_of(kind, **changes).text)


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def check_names(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    for module, name in imported(tree):
        public = dir(importlib.import_module(module))
        if module == "diffusers_ext":
            public = diffusers_ext.__all__
        assert name in public, f"{module}.{name}"


def check_calls(tree: ast.Module) -> None:
    """Raises `TypeError` where a function of the package does not take the arguments."""
    ours = {name for module, name in imported(tree) if module == "diffusers_ext"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ours:
            function = getattr(diffusers_ext, node.func.id)
        elif (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in ours
        ):
            function = getattr(getattr(diffusers_ext, node.func.value.id), node.func.attr)
        else:
            continue
        inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})


def test_every_python_block_runs_on_what_there_is(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            for changes in (changes for varied, changes in VARIANTS if varied == kind):
                found = blocks(kind, changes)
                assert len(found) >= 2
                assert max(map(len, "\n".join(found).splitlines())) <= 120
                for source in found:
                    tree = ast.parse(source)
                    compile(tree, kind, "exec")
                    check_names(tree)
                    check_calls(tree)
                # One block needs this package, and the last one does not.
                assert "diffusers_ext" in found[0]
                assert "diffusers_ext" not in found[-1]


def test_the_checks_find_what_is_not_there():
    with pytest.raises(AssertionError, match=r"diffusers_ext\.load_nothing"):
        check_names(ast.parse("from diffusers_ext import load_nothing"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'strength'"):
        check_calls(ast.parse("from diffusers_ext import check_loaded_lora\ncheck_loaded_lora(a, strength=1)"))

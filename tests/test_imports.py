"""Rules about the source that no other tool checks: who may import whom, sizes, names, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffusers.pipelines
import pytest


ROOT = Path(__file__).parents[1]
TOOLS = {"nullspace", "golden_noise", "eraser", "rewards"}
LIBRARY = {"core", "community", "evaluation", "planning", *TOOLS}
CONSOLE = "command_line"  # the only part of the library that talks to a terminal
# unit -> units of this repository that it may import, besides itself; a unit is a folder of the
# library or a folder beside it, "library" is `diffusers_ext` as a whole
MAY_IMPORT: dict[str, set[str]] = {
    "hub_cards": set(),
    "core": {"hub_cards"},
    **{tool: {"core", "hub_cards"} for tool in TOOLS},
    "evaluation": {"core", "hub_cards", *TOOLS},
    "planning": {"core", "hub_cards", *TOOLS},
    "community": {"core", "hub_cards", *TOOLS},
    "library": {"hub_cards", *LIBRARY},
    CONSOLE: {"library", *LIBRARY},
    "training": {"library", "hub_cards", *LIBRARY},
    "examples": {"library", "training", "benchmarks", *LIBRARY},
    "benchmarks": {"library", "training", "examples", *LIBRARY},
}
FOLDERS = ("diffusers_ext", "training", "hub_cards", "examples", "benchmarks", "tests")
MOST_LINES, MOST_BODY_LINES = 250, 50
# What may be longer, and why.
LONG_FILES = {
    "examples/digits/train_model.py": "one script, kept whole as it made the bundled weights",
}
LONG_FUNCTIONS: dict[str, str] = {}
CATCH_ALL_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "stuff"}

FILES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
)
SOURCES = [path for path in FILES if path.parts[0] != "tests"]
LIBRARY_FILES = [path for path in FILES if path.parts[0] == "diffusers_ext"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def unit_of(parts: tuple[str, ...]) -> str | None:
    """The unit of a module's dotted name; `None` for what is not of this repository."""
    if parts[0] != "diffusers_ext":
        return parts[0] if parts[0] in FOLDERS else None
    return parts[1] if len(parts) > 1 and parts[1] in {CONSOLE, *LIBRARY} else "library"


def imports(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Dotted names of all imported modules, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = tuple(node.module.split("."))
            # `from diffusers_ext import core` names the unit only after the import.
            yield from ((*module, alias.name) for alias in node.names)


def forbidden(path: Path, tree: ast.AST) -> list[str]:
    """The imports of a file that its unit may not have."""
    unit = unit_of(path.with_suffix("").parts)
    found = {".".join(name): unit_of(name) for name in imports(tree)}
    allowed = {unit, None, *MAY_IMPORT[unit]}
    return sorted(name for name, target in found.items() if target not in allowed)


def functions(tree: ast.Module) -> Iterator[tuple[str, Function, bool]]:
    """(dotted name, node, whether it is public) of functions and methods, not of nested ones.

    Setters share the name and the docstring of their property.
    """
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, Function) and not any(
                getattr(decorator, "attr", None) == "setter" for decorator in member.decorator_list
            ):
                name = prefix + member.name
                private = name.startswith("_") or "._" in name
                yield name, member, not private or name.endswith(".__init__")


def body_lines(node: Function) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path):
    assert forbidden(path, parse(path)) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("diffusers_ext/core/a.py", "from diffusers_ext.nullspace.slots import FEATURES"),
        ("diffusers_ext/nullspace/a.py", "import diffusers_ext.eraser.model"),
        ("diffusers_ext/eraser/a.py", "from diffusers_ext import evaluation"),
        ("diffusers_ext/evaluation/a.py", "from diffusers_ext import collect_statistics"),
        ("diffusers_ext/rewards/a.py", "def f():\n    from training.loop import TrainingLoop"),
        ("hub_cards/a.py", "import diffusers_ext"),
        ("diffusers_ext/evaluation/a.py", "from diffusers_ext.command_line.main import main"),
        ("diffusers_ext/sharing.py", "import diffusers_ext.command_line"),
        ("diffusers_ext/command_line/a.py", "from training.plugins import load_reward"),
        ("training/a.py", "from examples.digits.judge import DigitsJudge"),
        ("examples/a.py", "import tests.tiny_models"),
    ],
)
def test_the_rule_finds_imports_the_other_way(path, code):
    assert len(forbidden(Path(path), ast.parse(code))) == 1


def test_no_subpackage_is_named_like_a_pipeline_of_diffusers():
    pipelines = {path.name for path in Path(diffusers.pipelines.__file__).parent.iterdir()}
    assert {"stable_diffusion", "flux"} < pipelines
    own = {part.removesuffix(".py") for path in LIBRARY_FILES for part in path.parts[1:2]}
    assert own & LIBRARY
    assert not own & pipelines


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_tell_what_is_in_a_file(path):
    assert path.stem.removeprefix("test_") not in CATCH_ALL_NAMES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    if str(path) not in LONG_FILES:
        assert len(text.splitlines()) <= MOST_LINES
    lengths = {f"{path}:{name}": body_lines(node) for name, node, _ in functions(ast.parse(text))}
    long = {name: n for name, n in lengths.items() if n > MOST_BODY_LINES}
    assert long.keys() <= LONG_FUNCTIONS.keys(), long


def test_exceptions_from_the_size_rule_are_needed_and_explained():
    for name, reason in {**LONG_FILES, **LONG_FUNCTIONS}.items():
        path, _, function = name.partition(":")
        if function:
            nodes = {found: node for found, node, _ in functions(parse(Path(path)))}
            assert body_lines(nodes[function]) > MOST_BODY_LINES, name
        else:
            assert len((ROOT / path).read_text().splitlines()) > MOST_LINES, name
        assert len(reason.split()) >= 4


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_public_functions_have_annotations_and_docstrings(path):
    tree = parse(path)
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
    for name, node, public in functions(tree):
        if not public:
            continue
        # The class tells what these do.
        obvious = name.startswith("_") or name.endswith(("__init__", ".forward", "__"))
        assert ast.get_docstring(node) or obvious, name
        assert node.returns is not None, name
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{name}({', '.join(bare)})"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=str)
def test_the_library_neither_prints_nor_asserts_nor_swallows_errors(path):
    is_console = unit_of(path.with_suffix("").parts) == CONSOLE
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert is_console or node.func.id != "print", f"print in line {node.lineno}"
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            broad = {None, "Exception"}
            caught = node.type.id if isinstance(node.type, ast.Name) else node.type
            assert caught not in broad, f"a broad except in line {node.lineno}"
    assert is_console or "argparse" not in {name[0] for name in imports(parse(path))}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] != "examples"], ids=str)
def test_nothing_is_fetched_or_run_at_import(path):
    doors = {"from_pretrained", "hf_hub_download", "snapshot_download", "load_dataset"}
    for statement in parse(path).body:
        if isinstance(statement, (ast.ClassDef, *Function.__args__)):
            continue
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", None))
            for node in ast.walk(statement)
            if isinstance(node, ast.Call)
        }
        assert not called & doors


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_names_a_machine_path(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not [f"/{name}/" for name in ("work", "tmp", "root", "home") if f'"/{name}/' in text]

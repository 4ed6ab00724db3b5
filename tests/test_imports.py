"""Rules about the source that no other tool checks: who may import whom, sizes, names, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffusers.pipelines

ROOT = Path(__file__).parents[1]
TOOLS = {"nullspace", "golden_noise", "eraser", "rewards"}
GROUND = {"hub", "core", "families"}
LIBRARY = {*GROUND, *TOOLS, "community", "evaluation", "planning", "training", "command_line"}
CONSOLE = {"command_line", "training"}  # the parts of the library that talk to a terminal
# unit -> units of this repository that it may import, besides itself; a unit is a folder of the
# library or a folder beside it, "library" is what lies in no folder of `diffusers_ext`, "scripts"
# the top-level `training`
MAY_IMPORT: dict[str, set[str]] = {
    "hub": set(),
    "core": {"hub"},
    "families": {"hub", "core"},
    **dict.fromkeys(TOOLS, GROUND),
    **{above: {*GROUND, *TOOLS} for above in ("evaluation", "planning", "community")},
    "library": LIBRARY - CONSOLE,
    "training": {"library", *LIBRARY} - {"command_line"},
    "command_line": {"library", *LIBRARY},
    "scripts": {"library", *LIBRARY},
    "examples": {"library", "scripts", "benchmarks", *LIBRARY},
    "benchmarks": {"library", "scripts", "examples", *LIBRARY},
}
FOLDERS = ("diffusers_ext", "training", "examples", "benchmarks", "tests")
MOST_LINES, MOST_BODY_LINES = 400, 50
# What may be longer, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
CATCH_ALL_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "stuff"}

FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in FILES if path.parts[0] != "tests"]
LIBRARY_FILES = [path for path in FILES if path.parts[0] == "diffusers_ext"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def unit_of(parts: tuple[str, ...]) -> str | None:
    """The unit of a module's dotted name; `None` for what is not of this repository."""
    if parts[0] != "diffusers_ext":
        return {"training": "scripts"}.get(parts[0], parts[0]) if parts[0] in FOLDERS else None
    return parts[1] if len(parts) > 1 and parts[1] in LIBRARY else "library"


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


def test_imports_go_one_way():
    offenders = {str(path): forbidden(path, parse(path)) for path in SOURCES}
    assert {path: names for path, names in offenders.items() if names} == {}


def test_the_rule_finds_imports_the_other_way(subtests):
    for path, code in [
        ("diffusers_ext/core/a.py", "from diffusers_ext.nullspace.slots import FEATURES"),
        ("diffusers_ext/nullspace/a.py", "import diffusers_ext.eraser.adapter.model"),
        ("diffusers_ext/eraser/a.py", "from diffusers_ext import evaluation"),
        ("diffusers_ext/evaluation/a.py", "from diffusers_ext import collect_statistics"),
        ("diffusers_ext/rewards/a.py", "def f():\n    from diffusers_ext.training.run.loop import TrainingLoop"),
        ("diffusers_ext/hub/a.py", "from diffusers_ext.core.artifacts import Artifact"),
        ("diffusers_ext/evaluation/a.py", "from diffusers_ext.command_line.main import main"),
        ("diffusers_ext/sharing.py", "import diffusers_ext.command_line"),
        ("diffusers_ext/command_line/a.py", "from training.train_npnet import main"),
        ("diffusers_ext/training/a.py", "import diffusers_ext.command_line.main"),
        ("training/a.py", "from examples.digits.judge import DigitsJudge"),
        ("examples/a.py", "import tests.tiny_models"),
    ]:
        with subtests.test(path=path, code=code):
            assert len(forbidden(Path(path), ast.parse(code))) == 1


def test_no_subpackage_is_named_like_a_pipeline_of_diffusers():
    pipelines = {path.name for path in Path(diffusers.pipelines.__file__).parent.iterdir()}
    assert {"stable_diffusion", "flux"} < pipelines
    own = {part.removesuffix(".py") for path in LIBRARY_FILES for part in path.parts[1:2]}
    assert own & LIBRARY
    assert not own & pipelines


def test_names_tell_what_is_in_a_file():
    assert [p for p in FILES if p.stem.removeprefix("test_") in CATCH_ALL_NAMES] == []


def test_files_and_functions_are_short():
    long = {}
    for path in FILES:
        text = (ROOT / path).read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES and str(path) not in LONG_FILES:
            long[str(path)] = len(text.splitlines())
        for name, node, _ in functions(ast.parse(text)):
            where = f"{path}:{name}"
            if body_lines(node) > MOST_BODY_LINES and where not in LONG_FUNCTIONS:
                long[where] = body_lines(node)
    assert long == {}


def test_exceptions_from_the_size_rule_are_needed_and_explained():
    for name, reason in {**LONG_FILES, **LONG_FUNCTIONS}.items():
        path, _, function = name.partition(":")
        if function:
            nodes = {found: node for found, node, _ in functions(parse(Path(path)))}
            assert body_lines(nodes[function]) > MOST_BODY_LINES, name
        else:
            assert len((ROOT / path).read_text().splitlines()) > MOST_LINES, name
        assert len(reason.split()) >= 4


def undocumented(tree: ast.Module, is_package: bool, told: frozenset[str] = frozenset()) -> Iterator[str]:
    """What of a file is public and lacks a docstring or an annotation; base classes have `told` some."""
    if not ast.get_docstring(tree) and not (is_package and not tree.body):
        yield "the module"
    for node in tree.body:
        public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield node.name
    for name, node, public in functions(tree):
        if not public:
            continue
        # The class tells what these do.
        obvious = name.startswith("_") or name.endswith(("__init__", ".forward", "__"))
        obvious |= name.rpartition(".")[2] in told
        if not (ast.get_docstring(node) or obvious):
            yield name
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            yield f"{name}({', '.join(bare)})"


def test_public_functions_have_annotations_and_docstrings():
    # What `Family` and `Velocity` say of a method holds for those of each family.
    bases = [Path("diffusers_ext", "families", name) for name in ("family.py", "velocity.py")]
    told = frozenset(name.rpartition(".")[2] for path in bases for name, *_ in functions(parse(path)))
    found = {
        str(p): list(
            undocumented(
                parse(p), p.name == "__init__.py", told if p.parts[1] == "families" and p not in bases else frozenset()
            )
        )
        for p in SOURCES
    }
    assert {path: names for path, names in found.items() if names} == {}
    tree = ast.parse("class A:\n    def f(self, x): ...\ndef g() -> None: ...")
    assert list(undocumented(tree, False)) == ["the module", "A", "A.f", "A.f(x)", "g"]


def careless(tree: ast.Module, is_console: bool) -> Iterator[str]:
    """Prints, asserts, broad excepts and command lines of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print" and not is_console:
                yield f"print in line {node.lineno}"
        if isinstance(node, ast.Assert):
            yield f"assert in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else node.type
            if caught in (None, "Exception", "BaseException") and not _reraises(node):
                yield f"a broad except in line {node.lineno}"
    if not is_console and "argparse" in {name[0] for name in imports(tree)}:
        yield "argparse"


def _reraises(handler: ast.ExceptHandler) -> bool:
    """Whether a handler cleans up and raises on; only then may it catch everything."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None and handler.type is not None


def test_the_library_neither_prints_nor_asserts_nor_swallows_errors():
    found = {
        str(path): list(careless(parse(path), unit_of(path.with_suffix("").parts) in CONSOLE))
        for path in LIBRARY_FILES
    }
    assert {path: names for path, names in found.items() if names} == {}
    tree = ast.parse("try:\n    print(1)\nexcept Exception:\n    pass\nassert 1")
    assert len(list(careless(tree, False))) == 3


def test_nothing_is_fetched_or_run_at_import():
    doors = {"from_pretrained", "hf_hub_download", "snapshot_download", "load_dataset"}
    found = {}
    for path in SOURCES:
        statements = [
            statement
            for statement in parse(path).body
            if not isinstance(statement, (ast.ClassDef, *Function.__args__))
        ]
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", None))
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Call)
        }
        if called & doors and path.parts[0] != "examples":
            found[str(path)] = called & doors
    assert found == {}


def test_no_file_names_a_machine_path():
    found = {
        str(path): name
        for path in FILES
        for name in ("work", "tmp", "root", "home")
        if f'"/{name}/' in (ROOT / path).read_text(encoding="utf-8")
    }
    assert found == {}

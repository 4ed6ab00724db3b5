"""What is known of a base model lies in `families/`: no ladder and no model class anywhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import diffusers

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("diffusers_ext", "training")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parts[-2] != "families"
]
GENERAL = {"AutoModel", "DiffusionPipeline", "EMAModel", "ModularPipeline"}
MODELS = {
    name
    for name in dir(diffusers)
    if re.search(r"(Pipeline|Model|Transformer\w*|^Autoencoder\w+)$", name) and name not in GENERAL
}
# file -> classes that it may name, and why
_SUBCLASSES = "the public pipelines derive from those of diffusers"
ALLOWED: dict[str, tuple[set[str], str]] = {
    "diffusers_ext/golden_noise/pipelines.py": (
        {
            "Flux2KleinPipeline",
            "Flux2Pipeline",
            "FluxPipeline",
            "HunyuanDiTPipeline",
            "QwenImagePipeline",
            "StableDiffusion3Pipeline",
            "StableDiffusionPipeline",
            "StableDiffusionXLPipeline",
            "ZImagePipeline",
        },
        _SUBCLASSES,
    ),
    "diffusers_ext/nullspace/pipeline.py": (
        {
            "AuraFlowPipeline",
            "ChromaPipeline",
            "Flux2KleinPipeline",
            "FluxPipeline",
            "QwenImagePipeline",
            "StableDiffusion3Pipeline",
            "StableDiffusionPipeline",
            "StableDiffusionXLPipeline",
            "WanPipeline",
            "ZImagePipeline",
        },
        _SUBCLASSES,
    ),
}


def named(tree: ast.AST) -> Iterator[str]:
    """Identifiers and strings of a file, without its docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def ladders(tree: ast.AST) -> Iterator[str]:
    """Comparisons of a family with a literal, or with several."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and re.search(r"\bfamily\b", ast.unparse(node.left)):
            literals = [ast.walk(part) for part in node.comparators]
            if any(isinstance(leaf, ast.Constant) and leaf.value for walk in literals for leaf in walk):
                yield ast.unparse(node)


def offences(code: str) -> set[str]:
    tree = ast.parse(code)
    return MODELS.intersection(named(tree)) | set(ladders(tree))


def test_no_file_outside_of_families_knows_a_base_model():
    found = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        allowed, _ = ALLOWED.get(name, (set(), ""))
        found[name] = offences(path.read_text(encoding="utf-8")) - allowed
    assert {name: sorted(names) for name, names in found.items() if names} == {}


def test_exceptions_are_needed_and_explained():
    for name, (allowed, reason) in ALLOWED.items():
        assert allowed <= offences((ROOT / name).read_text(encoding="utf-8")), name
        assert len(reason.split()) >= 4, name


def test_the_rule_finds_offences():
    assert offences("from diffusers import FluxPipeline\nx = isinstance(p, FluxPipeline)")
    assert offences('if kind == "CogVideoXPipeline":\n    pass') == {"CogVideoXPipeline"}
    assert offences('if family == "sd":\n    pass') == {"family == 'sd'"}
    assert offences('y = shapes.family.name in ("sd3", "flux")')
    assert not offences('"""Of a `FluxPipeline`."""\nfrom diffusers import DiffusionPipeline\nfamily is None')

"""The front page: short, its Python compiles, its files and flags exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers_ext


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_python_blocks_compile_and_import_public_names():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "diffusers_ext":
                assert {alias.name for alias in node.names} <= set(diffusers_ext.__all__)


def test_flags_of_the_commands_exist():
    for script, flags in re.findall(
        r"accelerate launch (training/\w+\.py)(.*?)```", README, re.DOTALL
    ):
        module = __import__(f"training.{Path(script).stem}", fromlist=["parse_args"])
        arguments = re.findall(r"(--\w+) (\"[^\"]+\"|<?[\w./-]+>?)", flags)
        args = module.parse_args([text.strip('"') for pair in arguments for text in pair])
        assert args.output_dir


def test_named_files_exist():
    for name in re.findall(
        r"`((?:benchmarks|examples|training|diffusers_ext)/?[\w/]*(?:\.py)?)`", README
    ):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture

"""Folders of pipelines that transformers 4 and 5 read alike, and a word where 4 meets one that only 5 reads.

From 5 on CLIP's text encoder has no `text_model` in the names of its weights, and a tokenizer is one file. Where 4
reads such a folder, the text encoder keeps random weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX_NAME = "model_index.json"
_PREFIX = "text_model."
_FAST = "Fast"
_SAYS_TORCH_DTYPE = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40)


def with_known_dtype(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `from_pretrained` of diffusers, which below 0.40 passes `dtype` over and knows `torch_dtype`."""
    if "dtype" not in arguments or not _SAYS_TORCH_DTYPE:
        return dict(arguments)
    return {"torch_dtype" if name == "dtype" else name: value for name, value in arguments.items()}


def write_for_transformers_4(folder: str | os.PathLike) -> None:
    """Give a saved pipeline the names that both major versions read; what has them already stays as it is."""
    folder = Path(folder)
    index = _read(folder / INDEX_NAME)
    for name in _single_files(folder, index):
        index[name] = [index[name][0], index[name][1] + _FAST]  # which 5 takes for the same class
    _write(folder / INDEX_NAME, index)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        config = _read(path)
        if config.get("extra_special_tokens") == []:  # in 4 it is a mapping
            del config["extra_special_tokens"]
            _write(path, config)
    for encoder in _text_encoders(folder):
        for path in encoder.glob("*.safetensors"):
            tensors = load_file(path)
            if not all(name.startswith(_PREFIX) for name in tensors):
                written = path.with_suffix(".partial")
                save_file({_prefixed(name): value for name, value in tensors.items()}, written, {"format": "pt"})
                os.replace(written, path)
        for path in encoder.glob("*.safetensors.index.json"):
            shards = _read(path)
            shards["weight_map"] = {_prefixed(name): file for name, file in shards["weight_map"].items()}
            _write(path, shards)


def check_readable(folder: str | os.PathLike, argument: str) -> None:
    """Raise `ValueError` for a folder of which transformers 4, where that is installed, would read random weights."""
    if int(transformers.__version__.split(".")[0]) > 4:
        return
    folder = Path(folder)
    found = [
        encoder.name
        for encoder in _text_encoders(folder)
        for path in encoder.glob("*.safetensors")
        if not all(name.startswith(_PREFIX) for name in _names(path))
    ]
    if (folder / INDEX_NAME).is_file():
        found += _single_files(folder, _read(folder / INDEX_NAME))
    if found:
        raise ValueError(
            f"`{argument}` must be a model that transformers {transformers.__version__} reads, got {folder}, whose "
            f"{', '.join(found)} transformers 5 has saved. Upgrade it: pip install 'transformers>=5'."
        )


def _text_encoders(folder: Path) -> list[Path]:
    configs = sorted(folder.glob("text_encoder*/config.json"))
    return [path.parent for path in configs if _read(path).get("architectures") == ["CLIPTextModel"]]


def _single_files(folder: Path, index: dict[str, Any]) -> list[str]:
    """Names of the tokenizers that are one file, under the name of a class that reads several in transformers 4."""
    return [
        name
        for name, value in index.items()
        if name.startswith("tokenizer") and isinstance(value, list) and value[0] == "transformers"
        if not value[1].endswith(_FAST) and hasattr(transformers, value[1] + _FAST)
        if {path.name for path in (folder / name).glob("*.*")} & {"tokenizer.json", "vocab.json", "spiece.model",
           "tokenizer.model", "vocab.txt"} == {"tokenizer.json"}
    ]  # fmt: skip


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as handle:
        return list(handle.keys())


def _prefixed(name: str) -> str:
    return _PREFIX + name.removeprefix(_PREFIX)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

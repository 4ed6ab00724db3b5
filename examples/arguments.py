"""What all examples share: options of the command line with defaults, where models run, how they are stored."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

# Half the memory where it is fast; bfloat16 has the range of float32, so VAEs and LoRAs do not overflow.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def read_arguments(description: str | None, input_args: Sequence[str] | None, **defaults: Any) -> argparse.Namespace:
    """The options `--name value` of a command line.

    Args:
        description: for `--help`.
        input_args: the command line; the process's when `None`.
        defaults: one per option, whose type it has: a tuple takes several texts, a type as default is a required
            option, `None` a text that may be missing.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        if isinstance(default, type):
            parser.add_argument(f"--{name}", type=default, required=True)
        elif isinstance(default, tuple):
            parser.add_argument(f"--{name}", nargs="+", default=default)
        else:
            kind = str if default is None else type(default)
            parser.add_argument(f"--{name}", type=kind, default=default, help=f"[{default}]")
    return parser.parse_args(input_args)


def save_in_half_precision(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Save a pipeline in float16 so that it loads in float32 where no dtype is asked for, and names no folder of here.

    diffusers loads its own models in float32 then, but transformers loads what their configs name, and writes there
    what is stored: a text encoder in float16 beside a denoiser in float32.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    for path in Path(folder).glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        _write_json(path, config)
    _write_for_transformers_4(Path(folder))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_for_transformers_4(folder: Path) -> None:
    """Names that both major versions read: what 5 writes, 4 takes for other weights, or not at all.

    CLIP's text encoder had its parameters under `text_model`, as all folders of the Hub still do; the tokenizers that
    read a `tokenizer.json` end in `Fast`, which 5 takes for the same.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if name.startswith("tokenizer") and value[0] == "transformers" and not value[1].endswith("Fast"):
            index[name] = ["transformers", f"{value[1]}Fast"]
    _write_json(folder / "model_index.json", index)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("extra_special_tokens") == []:  # there it is a mapping
            del config["extra_special_tokens"]
        _write_json(path, config)
    for path in folder.glob("text_encoder*/config.json"):
        weights = path.with_name("model.safetensors")
        tensors = load_file(weights)
        if json.loads(path.read_text(encoding="utf-8"))["model_type"] == "clip_text_model":
            tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
            save_file(tensors, weights, metadata={"format": "pt"})

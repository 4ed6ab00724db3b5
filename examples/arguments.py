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

from diffusers_ext.hub.saved_pipelines import write_for_transformers_4

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
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_for_transformers_4(folder)

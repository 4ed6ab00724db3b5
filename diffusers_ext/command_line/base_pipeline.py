"""The base model of a command line: its arguments, and loading it to draw pictures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


_DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_base_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which base model, and how it runs."""
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=required,
        help="folder or Hub name of a pipeline, or .safetensors file of Stable Diffusion or SDXL",
    )
    group.add_argument(
        "--single_file_config",
        help="folder or Hub name of a diffusers model whose configs and tokenizer a .safetensors file is "
        "read with; what diffusers infers without it",
    )
    group.add_argument("--revision", help="of the base model on the Hub")
    group.add_argument("--variant", help="of the weight files, e.g. fp16")
    group.add_argument("--mixed_precision", choices=list(_DTYPES), default="no")
    group.add_argument("--device", help="e.g. cuda:1; a GPU if there is one without it")
    group.add_argument("--seed", type=int, default=0, help="of everything random")


def chosen_device(args: argparse.Namespace) -> torch.device:
    """`--device`, or the best one there is."""
    import torch

    if args.device is not None:
        try:
            return torch.device(args.device)
        except RuntimeError as error:
            raise ValueError(f"`device` must be one of torch's, got {args.device!r}.") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_pipeline_class(args: argparse.Namespace, class_name: str | None = None) -> dict[str, Any]:
    """The base model's `model_index.json`, read before any weights.

    Args:
        args: with the arguments of `add_base_model_arguments`.
        class_name: the only pipeline class that will do; any when `None`.

    Raises:
        ValueError: no pipeline, or one of another class.
    """
    from diffusers_ext.core.base_source import read_base_config, refuse_single_file

    source = args.pretrained_model_name_or_path
    if class_name is not None:
        refuse_single_file(source, f"a {class_name}")
    components = read_base_config(
        source, revision=args.revision, single_file_config=args.single_file_config
    )
    found = components["_class_name"]
    if class_name is not None and found != class_name:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a {class_name}, got a {found} in {source}."
        )
    return components


def load_base_pipeline(
    args: argparse.Namespace, class_name: str | None = None, *, place: bool = True
) -> DiffusionPipeline:
    """The base model, frozen, in evaluation mode, without a safety checker.

    Args:
        args: with the arguments of `add_base_model_arguments`.
        class_name: as in `check_pipeline_class`.
        place: move it to the device.

    Raises:
        ValueError: no pipeline, or one of another class.
    """
    import torch

    from diffusers_ext.core.base_source import load_base

    device, components = chosen_device(args), check_pipeline_class(args, class_name)
    # A blackened picture would be measured like any other.
    unfiltered: dict[str, Any] = {"safety_checker": None} if "safety_checker" in components else {}
    if "requires_safety_checker" in components:
        unfiltered["requires_safety_checker"] = False
    pipeline = load_base(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        single_file_config=args.single_file_config,
        dtype=getattr(torch, _DTYPES[args.mixed_precision]),
        **unfiltered,
    )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device) if place else pipeline

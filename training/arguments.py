"""Argument groups that the scripts share, and YAML files as another way to give the same arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which base model."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", help="YAML file with any of these arguments; flags override it")
    group.add_argument("--pretrained_model_name_or_path", help="base model: folder or Hub name")
    group.add_argument("--revision", help="revision of the base model on the Hub")
    group.add_argument("--variant", help="variant of the weight files, e.g. fp16")
    group.add_argument("--output_dir", help="folder for everything this run writes")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Loop, optimizer and checkpoints."""
    group = parser.add_argument_group("training")
    group.add_argument("--max_train_steps", type=int, default=600)
    group.add_argument("--train_batch_size", type=int, default=4)
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    group.add_argument("--allow_tf32", action="store_true", help="faster on Ampere and newer")
    group.add_argument("--dataloader_num_workers", type=int, default=0)
    group.add_argument("--learning_rate", type=float)
    group.add_argument(
        "--scale_lr", action="store_true", help="times processes, batch, accumulation"
    )
    group.add_argument("--lr_scheduler", default="constant", help="name of a diffusers schedule")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--checkpointing_steps", type=int, help="none are written without it")
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")


def add_reporting_arguments(parser: argparse.ArgumentParser) -> None:
    """Logs, validation pictures, upload."""
    group = parser.add_argument_group("reporting")
    group.add_argument("--report_to", help="tensorboard, wandb, ...; nothing without it")
    group.add_argument("--logging_dir", default="logs", help="below the output folder")
    group.add_argument("--logging_steps", type=int, default=10)
    group.add_argument("--validation_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--num_validation_images", type=int, default=4)
    group.add_argument("--validation_steps", type=int, help="only at the end without it")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="repository; the output folder's name without it")
    group.add_argument("--hub_token", help="taken from the login without it")
    group.add_argument("--hub_private_repo", action="store_true")


def add_knowledge_arguments(parser: argparse.ArgumentParser) -> None:
    """What is preserved and how it is measured."""
    group = parser.add_argument_group("knowledge")
    group.add_argument("--knowledge_prompts", help="text file, one prompt a line, # comments")
    group.add_argument("--other_instance_prompts", action="append", default=[])
    group.add_argument("--features", nargs="+", default=["k", "v"])
    group.add_argument("--cross_attention_layers", nargs="+", default="all", help="all, or indices")
    group.add_argument("--negative_prompt", default="")
    group.add_argument("--no_sub_phrases", action="store_true")
    group.add_argument("--num_inference_steps", type=int, default=50)
    group.add_argument("--guidance_scale", type=float, default=7.5)
    group.add_argument("--statistics_batch_size", type=int, default=4)
    group.add_argument("--nullspace_threshold", type=float, help="absolute eigenvalue limit")


def parse_arguments(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str] | None,
    required: Sequence[str],
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parse flags over an optional YAML file.

    Args:
        parser: with a `--config` argument.
        input_args: command line; `None` takes the process's.
        required: names that the file or the flags must give.
        read_block: turns nested blocks of the file into flat argument names.
    """
    config_path = parser.parse_known_args(input_args)[0].config
    if config_path is not None:
        values = read_config(config_path)
        values = values if read_block is None else read_block(values)
        known = {action.dest for action in parser._actions}
        unknown = sorted(values.keys() - known)
        if unknown:
            parser.error(f"`{config_path}` must hold known arguments, got {unknown}")
        # Strings go through each argument's own type: YAML reads `2e-2` as a string.
        parser.set_defaults(**values)
    args = parser.parse_args(input_args)
    missing = [name for name in required if getattr(args, name) is None]
    if missing:
        parser.error(f"these arguments must be given: {', '.join('--' + name for name in missing)}")
    if getattr(args, "report_to", None) == "wandb" and args.hub_token:
        parser.error("`--hub_token` must not be used with `--report_to wandb`, which would log it")
    return args


def read_config(path: str) -> dict[str, Any]:
    """The mapping of a YAML file; raises `ValueError` for a missing or other file."""
    if not Path(path).is_file():
        raise ValueError(f"`config` must be a YAML file, got {path}: no such file.")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"`config` must be a YAML mapping, got {type(values).__name__} in {path}.")
    return values


_BLOCK_NAMES = {
    "original_knowledge_prompts": "knowledge_prompts",
    "cov_matrices_output_dir": "statistics",
    "num_denoising_steps": "num_inference_steps",
    "nullspace_threshold": "nullspace_threshold",
    "cross_attention_layers": "cross_attention_layers",
    "visual_attention_map": "visual_attention_map",
    "collect_features": "features",
    "enable": "enable",
}


def read_nullbooth_block(values: dict[str, Any]) -> dict[str, Any]:
    """Flat arguments from a file whose `nullbooth:` block has the keys of the original system."""
    values = dict(values)
    block = values.pop("nullbooth", None) or {}
    unknown = sorted(block.keys() - _BLOCK_NAMES.keys())
    if unknown:
        raise ValueError(f"`nullbooth` must have keys among {sorted(_BLOCK_NAMES)}, got {unknown}.")
    flat = {_BLOCK_NAMES[key]: value for key, value in block.items()}
    if "features" in flat:
        chosen = flat["features"]
        flat["features"] = [k.removesuffix("_features") for k, wanted in chosen.items() if wanted]
    if "nullspace_threshold" in flat:
        flat["nullspace_threshold"] = float(flat["nullspace_threshold"])
    return {**flat, **values}


def read_layers(value: str | Sequence[int | str]) -> str | list[int]:
    """`--cross_attention_layers` as `"all"` or a list of indices."""
    if value == "all" or list(value) == ["all"]:
        return "all"
    try:
        return [int(index) for index in value]
    except ValueError as error:
        raise ValueError(
            f"`cross_attention_layers` must be 'all' or indices, got {value}."
        ) from error

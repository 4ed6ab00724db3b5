"""Arguments from a YAML file under those of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_ext.core.settings import Settings, did_you_mean, setting_names
from diffusers_ext.core.text_files import read_yaml

_FROM_THE_WEIGHTS = "nothing: the network's form is read from its file"

# Each with what stands for it.
DOCUMENTED_FLAGS = {
    # eraser
    "--model_path": "--pretrained_model_name_or_path",
    "--batch_size": "--train_batch_size",
    "--use_fp16": "--mixed_precision fp16, or bf16",
    "--use_cpu_offload": "nothing: it trains without the text encoder and keeps the VAE on the CPU; "
    "--gradient_checkpointing saves more",
    # golden noise
    "--npnet_weights_path": "--noise_model",
    "--evaluation_prompts_file": "--prompt_file",
    "--metrics": "--reward",
    "--npnet_model_id": _FROM_THE_WEIGHTS,
    "--svd_dropout": _FROM_THE_WEIGHTS,
    "--nt_adapter": _FROM_THE_WEIGHTS,
    "--nt_finetune": _FROM_THE_WEIGHTS,
    "--nt_dropout": _FROM_THE_WEIGHTS,
    "--cross_attention": _FROM_THE_WEIGHTS,
}


def replaced_flag(parser: argparse.ArgumentParser, input_args: Sequence[str]) -> str | None:
    """What to say about the first documented flag that `parser` has not; `None` without one.

    Args:
        parser: of a script; it takes abbreviations only where it allows them.
        input_args: command line.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in input_args:
        flag = argument.partition("=")[0]
        use = DOCUMENTED_FLAGS.get(flag)
        if use is None or any(option.startswith(flag) for option in known):
            continue
        named = use.split()[0].rstrip(",")
        if not named.startswith("--") or named in known:
            return f"`{flag}` of the design documents is not known here; use {use}."
    return None


def parse_arguments(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str] | None,
    required: Sequence[str],
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    groups: Sequence[type[Settings]] = (),
) -> argparse.Namespace:
    """Parse flags over an optional YAML file.

    What the file holds is parsed as if it were written as flags, with the same types and choices; a flag of the
    command line replaces it.

    Args:
        parser: with a `--config` argument.
        input_args: command line; `None` takes the process's.
        required: names that the file or the flags must give.
        read_block: turns nested blocks of the file into flat argument names.
        groups: of all scripts that share one file. Names in them that `parser` lacks are another script's and are
            passed over; all other names are errors.
    """
    input_args = sys.argv[1:] if input_args is None else list(input_args)
    input_args = [*file_flags(parser, input_args, read_block, groups), *input_args]
    replaced = replaced_flag(parser, input_args)
    if replaced is not None:
        parser.error(replaced)
    args = parser.parse_args(input_args)
    missing = [name for name in required if getattr(args, name) is None]
    if missing:
        parser.error(f"these arguments must be given: {', '.join('--' + name for name in missing)}")
    if getattr(args, "report_to", None) == "wandb" and args.hub_token:
        parser.error("`--hub_token` must not be used with `--report_to wandb`, which would log it")
    from diffusers_ext.training.run.setup import settle_launcher_settings

    try:
        settle_launcher_settings(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def file_flags(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str],
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None,
    groups: Sequence[type[Settings]],
) -> list[str]:
    """What the file of `--config` holds and the command line does not give, as flags."""
    path = getattr(parser.parse_known_args(input_args)[0], "config", None)
    if path is None:
        return []
    values = read_config(path)
    values = values if read_block is None else read_block(values)
    known = {action.dest for action in parser._actions}
    unknown = sorted(values.keys() - known - setting_names(groups))
    if unknown:
        meant = did_you_mean(unknown, known)
        parser.error(f"`{path}` must hold known arguments, got {unknown}.{meant}")
    return _as_flags(parser, values, input_args)


def read_config(path: str) -> dict[str, Any]:
    """The mapping of a YAML file; raises `ValueError` for a missing or other file."""
    if not Path(path).is_file():
        raise ValueError(f"`config` must be a YAML file, got {path}: no such file.")
    values = read_yaml(path)
    unnamed = [key for key in values if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"`config` must have names as keys, got {unnamed[0]!r} in {path}.")
    return values


def _as_flags(parser: argparse.ArgumentParser, values: dict[str, Any], input_args: Sequence[str]) -> list[str]:
    """The values that `parser` knows and the command line does not give, as flags."""
    actions = {action.dest: action for action in parser._actions}
    unset = argparse.Namespace(**dict.fromkeys(actions))
    given = vars(parser.parse_known_args(input_args, unset)[0])
    flags: list[str] = []
    for name, value in values.items():
        if name in actions and value is not None and given[name] is None:
            try:
                flags += _as_flag(actions[name], value)
            except ValueError as error:
                parser.error(str(error))
    return flags


def _as_flag(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"`{action.dest}` must be true or false, got {value!r}")
        # Without a flag for False, False is the default.
        return [flag] if value else action.option_strings[1:2]
    if isinstance(value, dict):
        raise ValueError(f"`{action.dest}` must not be a mapping, got {value!r}")
    if action.type in (None, str):
        _check_texts(action, value if isinstance(value, list) else [value])
    if action.nargs is not None:
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError(f"`{action.dest}` must be one value, got {value!r}")
    return [f"{flag}={value}"]


# Flags that take `all` or numbers of layers or timesteps.
_WORDS_OR_NUMBERS = {"cross_attention_layers", "layout_timesteps"}


def _check_texts(action: argparse.Action, values: Sequence[Any]) -> None:
    """Raise where YAML has made something else of a text: `no` is false to it, and `007` is 7."""
    kinds = (str, int) if action.dest in _WORDS_OR_NUMBERS else str
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds)]
    if wrong:
        kind = "the truth value" if isinstance(wrong[0], bool) else type(wrong[0]).__name__
        raise ValueError(
            f"`{action.dest}` must be a text, got {kind} {str(wrong[0]).lower()}. YAML reads unquoted "
            f"no, off, yes and on as truth values and digits as numbers: quote it, as in "
            f'{action.dest}: "no"'
        )


_BLOCK_NAMES = {
    "original_knowledge_prompts": "knowledge_prompts",
    "num_denoising_steps": "num_inference_steps",
    "nullspace_threshold": "nullspace_threshold",
    "cross_attention_layers": "cross_attention_layers",
    "visual_attention_map": "visual_attention_map",
    "collect_features": "features",
    "enable": "enable",
}


# What the block stands for where statistics are written.
_TREE = {"export_layout": True, "layout_timesteps": "all", "layout_dir": "."}


def read_nullbooth_block(values: dict[str, Any], covariance_dir: str = "statistics") -> dict[str, Any]:
    """Flat arguments from a file whose `nullbooth:` block has the keys of the original system.

    Args:
        values: content of the file.
        covariance_dir: the argument that `cov_matrices_output_dir` gives: `"statistics"` where they are read,
            `"output_dir"` where they are written: as the tree of npy files that readers of the original system's files
            look for, at all timesteps of the run.
    """
    values = dict(values)
    block = values.pop("nullbooth", None) or {}
    if not isinstance(block, dict):
        raise ValueError(f"`nullbooth` must be a mapping, got {block!r}.")
    names = {**_BLOCK_NAMES, "cov_matrices_output_dir": covariance_dir}
    unknown = sorted(block.keys() - names.keys())
    if unknown:
        raise ValueError(
            f"`nullbooth` must have keys among {sorted(names)}, got {unknown}.{did_you_mean(unknown, names)}"
        )
    flat = {names[key]: value for key, value in block.items()}
    if "features" in flat:
        flat["features"] = _chosen_features(flat["features"])
    if block and covariance_dir == "output_dir":
        values = {**_TREE, **values}
    # The file's `output_dir` is the trained model's; the statistics have a folder of their own.
    both = sorted((flat.keys() & values.keys()) - {"output_dir"})
    if both:
        raise ValueError(f"`nullbooth` must not repeat what stands outside of it, got {both}.")
    return {**values, **flat}


def _chosen_features(chosen: Any) -> list[str]:
    wanted = list(chosen.values()) if isinstance(chosen, dict) else []
    if not any(wanted) or not all(isinstance(value, bool) for value in wanted):
        raise ValueError(
            f"`collect_features` must map names like `k_features` to true or false, one at least true, got {chosen!r}."
        )
    return [name.removesuffix("_features") for name, wanted in chosen.items() if wanted]

"""Argument groups of the scripts that evaluate; the others read settings classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from diffusers_ext.core.run_settings import ModelSettings, SamplingSettings
from diffusers_ext.nullspace.settings import (
    AttentionSettings,
    CollectionSettings,
    NullSpaceSettings,
)
from diffusers_ext.training.run.command_lines import TRACEBACK_FLAG
from diffusers_ext.training.run.settings import add_settings


def check_values(
    args: argparse.Namespace, names: Sequence[str], rule: str, holds: Callable[[Any], bool]
) -> None:
    """Raise `ValueError` where a given argument breaks a rule; `None` is not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


add_model_arguments = partial(add_settings, settings_class=ModelSettings)
add_sampling_arguments = partial(add_settings, settings_class=SamplingSettings)
add_attention_argument = partial(add_settings, settings_class=AttentionSettings)


def add_traceback_argument(parser: argparse._ActionsContainer) -> None:
    """Errors are one line without it."""
    parser.add_argument(TRACEBACK_FLAG, action="store_true", help="show where an error came from")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn and by what it is judged."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--lora", action="append", help="folder or file; may be repeated")
    group.add_argument("--knowledge_prompts", help="text file, one prompt a line, # comments")
    group.add_argument("--held_out_prompts", help="text file of knowledge not in the statistics")
    group.add_argument("--subject_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--subject_data_dir", help="pictures of the real subject, for similarity")
    group.add_argument("--judge", help="module:attribute, imported; see training/plugins.py")
    group.add_argument("--subject_judge", help="the same for the subject prompts")
    group.add_argument("--dino", help="DINOv2 for features: folder or Hub name")
    group.add_argument("--clip", help="CLIP for scores, and features without DINOv2")
    group.add_argument("--pixel_features", action="store_true", help="pixels as features")
    group.add_argument("--distribution", action="store_true", help="also compare distributions")
    group.add_argument("--num_images_per_prompt", type=int, default=4, help="seeds a prompt")
    group.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    group.add_argument("--height", type=int, help="the model's own without it")
    group.add_argument("--width", type=int, help="the model's own without it")
    group.add_argument("--sheet_prompts", type=int, default=16, help="rows of the sheet per group")


NULL_SPACE_GROUPS = (NullSpaceSettings, CollectionSettings, add_evaluation_arguments)

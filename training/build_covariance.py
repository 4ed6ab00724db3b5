"""Measure what a Stable Diffusion or SDXL model already knows, for training in its null space.

    accelerate launch training/build_covariance.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --knowledge_prompts knowledge.txt --output_dir outputs/statistics
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate.logging import get_logger


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.argument_parser import OneLineParser
from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.nullspace.slots import FEATURES, check_features
from training.argument_rules import check_values
from training.arguments import (
    NULL_SPACE_GROUPS,
    add_attention_argument,
    add_covariance_arguments,
    add_hub_arguments,
    add_knowledge_arguments,
    add_model_arguments,
    add_resume_argument,
    add_sampling_arguments,
    read_layers,
    read_timesteps,
)
from training.closing_words import statistics_words
from training.collection_progress import check_resume, collection_facts, collection_progress
from training.config_file import parse_arguments, read_nullbooth_block
from training.knowledge import collect, load_pipeline, read_knowledge
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.publish import collection_card, prepare_upload, publish_statistics
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script
from training.statistics_report import has_matplotlib, write_statistics
from training.statistics_tree import check_tree_room, draw_attention_maps, write_tree
from training.upload import check_login


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_arguments in (
        add_model_arguments,
        add_resume_argument,
        add_sampling_arguments,
        add_knowledge_arguments,
        add_covariance_arguments,
        add_attention_argument,
        add_hub_arguments,
    ):
        add_arguments(parser)
    required = ("pretrained_model_name_or_path", "knowledge_prompts", "output_dir")
    read_block = partial(read_nullbooth_block, covariance_dir="output_dir")
    return parse_arguments(parser, input_args, required, read_block, NULL_SPACE_GROUPS)


def check_args(args: argparse.Namespace) -> list[str]:
    """Everything that can be wrong without loading a model; returns the preserved prompts."""
    chosen = check_features(args.features)
    args.features = [feature for feature in FEATURES if feature in chosen]  # in one order
    args.cross_attention_layers = read_layers(args.cross_attention_layers)
    args.layout_timesteps = read_timesteps(args.layout_timesteps)
    below = lambda value: not Path(value).is_absolute() and ".." not in Path(value).parts
    check_values(args, ["layout_dir"], "below the output folder", below)
    counts = ("num_inference_steps", "statistics_batch_size", "num_attention_maps")
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["nullspace_threshold"], "positive", lambda value: value > 0)
    check_values(args, ["compress"], "a share of the energy in (0, 1]", lambda v: 0 < v <= 1)
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    if args.visual_attention_map and not has_matplotlib():
        raise ValueError(
            "`visual_attention_map` must have matplotlib, got none: pip install diffusers_ext[plots]."
        )
    return read_knowledge(args)


@one_run_a_folder
def main(args: argparse.Namespace) -> Path:
    """Collect and save; returns the output folder."""
    prompts = check_args(args)
    accelerator = make_accelerator(args)
    facts = collection_facts(args, prompts, accelerator.num_processes)
    check_resume(args, facts)
    check_output_dir(args, (CONFIG_NAME,))
    if args.push_to_hub and accelerator.is_main_process:
        check_login(args)  # a missing login stops the run here, not after it
    pipeline = load_pipeline(args, accelerator.device, WEIGHT_DTYPES[args.mixed_precision])
    if args.push_to_hub and accelerator.is_main_process:
        prepare_upload(args, collection_card(args, pipeline, prompts))
    if args.export_layout:
        check_tree_room(args, pipeline)  # here, not after the work
    elif args.layout_timesteps is not None:
        logger.warning("No tree is written: --layout_timesteps is read with --export_layout.")
    with collection_progress(args, facts, accelerator) as progress_dir:
        began = time.perf_counter()
        statistics = collect(args, pipeline, accelerator, prompts, progress_dir)
        facts["seconds"] = time.perf_counter() - began
        if args.compress is not None:
            statistics = statistics.compress(args.compress)
        if accelerator.is_main_process:
            with staged_output(args.output_dir, last=(CONFIG_NAME,)) as folder:
                write_statistics(args, statistics, facts, folder)
                run = folder
                if args.export_layout:
                    run = write_tree(args, pipeline, statistics, folder)
                if args.visual_attention_map:
                    draw_attention_maps(args, pipeline, prompts, folder, run)
    logger.info(statistics_words(args, len(prompts), facts["seconds"]))
    if args.push_to_hub and accelerator.is_main_process:
        publish_statistics(args, pipeline, statistics)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main)

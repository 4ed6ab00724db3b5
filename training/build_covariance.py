"""Measure what a Stable Diffusion or SDXL model already knows, for training in its null space.

    accelerate launch training/build_covariance.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --knowledge_prompts knowledge.txt --output_dir outputs/statistics
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate.logging import get_logger


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.nullspace.settings import CollectionSettings
from training.arguments import NULL_SPACE_GROUPS
from training.closing_words import statistics_words
from training.collection_progress import check_resume, collection_facts, collection_progress
from training.config_file import read_nullbooth_block
from training.knowledge import collect, load_pipeline, read_knowledge
from training.output_folder import check_output_dir, one_run_a_folder, staged_output
from training.publish import collection_card, prepare_upload, publish_statistics
from training.run_setup import WEIGHT_DTYPES, make_accelerator
from training.script_entry import run_script
from training.settings import parse_settings
from training.statistics_report import has_matplotlib, write_statistics
from training.statistics_tree import check_tree_room, draw_attention_maps, write_tree
from training.upload import check_login


logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> CollectionSettings:
    """Command line of this script, over the YAML file of `--config`."""
    read_block = partial(read_nullbooth_block, covariance_dir="output_dir")
    return parse_settings(CollectionSettings, __doc__, input_args, read_block, NULL_SPACE_GROUPS)


def check_args(args: CollectionSettings) -> list[str]:
    """Everything that can be wrong without loading a model; returns the preserved prompts."""
    if args.visual_attention_map and not has_matplotlib():
        raise ValueError(
            "`visual_attention_map` must have matplotlib, got none: pip install diffusers_ext[plots]."
        )
    return read_knowledge(args)


@one_run_a_folder
def main(args: CollectionSettings) -> Path:
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
    run_script(parse_args, main, CollectionSettings)

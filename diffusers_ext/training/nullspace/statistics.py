"""Measure what a Stable Diffusion or SDXL model already knows, for training in its null space.

    accelerate launch training/build_covariance.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --knowledge_prompts knowledge.txt --output_dir outputs/statistics
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.utils.import_utils import is_matplotlib_available
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import CONFIG_NAME, write_atomically
from diffusers_ext.core.pipelines import denoiser_of, plain_class_name
from diffusers_ext.documented_names import read_nullbooth_block
from diffusers_ext.families import find_family
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.nullspace.attention_maps import (
    at_steps,
    attention_maps,
    draw_layer_attention,
    plot_attention_maps,
    spread_steps,
)
from diffusers_ext.nullspace.collect import sampled_timesteps
from diffusers_ext.nullspace.npy_tree import check_room, export_layout, layout_size
from diffusers_ext.nullspace.plots import plot_covariance_statistics, plot_null_dimensions, plot_spectrum
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.settings import CollectionSettings
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics, statistics_card
from diffusers_ext.training.nullspace.knowledge import (
    check_resume,
    collect,
    collection_facts,
    collection_progress,
    decode_in_pipeline_dtype,
    load_pipeline,
    read_knowledge,
)
from diffusers_ext.training.run.script import (
    card_arguments,
    check_login,
    check_output_dir,
    counted,
    lasted,
    one_run_a_folder,
    prepare_upload,
    push_output,
    run_script,
    script_line,
    staged_output,
)
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import NULL_SPACE_RUNS, WEIGHT_DTYPES, make_accelerator

logger = get_logger(__name__)

DEFAULT_THRESHOLD = 2e-2


def report_rows(statistics: FeatureStatistics, threshold: float) -> list[dict[str, Any]]:
    """`FeatureStatistics.report`, and how many eigenvalues of each matrix are below `threshold`."""
    rows = statistics.report()
    for row in rows:
        values = statistics.spectrum(row["matrix"]).values
        row["null_dims"] = null_dimensions(values, threshold=threshold)
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as a text table with aligned columns."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))])
        for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_statistics(
    settings: CollectionSettings, statistics: FeatureStatistics, facts: dict[str, Any], folder: Path
) -> None:
    """Write the artifact, `report.json` and the plots into `folder`."""
    threshold = settings.nullspace_threshold or DEFAULT_THRESHOLD
    rows = report_rows(statistics, threshold)
    logger.info(f"Statistics (null_dims: eigenvalues below {threshold:g})\n{format_table(rows)}")
    full = [row["matrix"] for row in rows if not row["null_dims"]]
    if full and settings.nullspace_threshold is not None:
        logger.warning(
            f"No eigenvalue is below `nullspace_threshold` {threshold:g} in {len(full)} of "
            f"{len(rows)} matrices, the first is {full[0]}. `--directions null` would refuse it; "
            "the default directions need no threshold."
        )
    statistics.save_pretrained(folder)
    report = {**facts, "nullspace_threshold": threshold, "matrices": rows}
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    if is_matplotlib_available():
        plot_spectrum(statistics, folder / "plots" / "spectrum.png")
        plot_null_dimensions(statistics, folder / "plots" / "null_dimensions.png")
    else:
        logger.info("No plots: they need matplotlib, `pip install diffusers_ext[plots]`.")


PICTURES = "visualizations"
SUMMARY_NAME = "covariance_summaries/covariance_statistics.png"


def tree_timesteps(settings: CollectionSettings, pipeline: DiffusionPipeline) -> list[int]:
    """The timesteps that the tree has folders for."""
    if settings.layout_timesteps == "all":
        return sampled_timesteps(pipeline.scheduler, settings.num_inference_steps)
    return [0] if settings.layout_timesteps is None else settings.layout_timesteps


def check_tree_room(settings: CollectionSettings, pipeline: DiffusionPipeline) -> None:
    """Log the most that the tree can take; raise `ValueError` where the disk has less."""
    linears = find_linears(denoiser_of(pipeline), settings.features, settings.cross_attention_layers)
    widths = {name: linear.in_features for name, linear in linears.items()}
    timesteps = tree_timesteps(settings, pipeline)
    check_room(len(timesteps) * layout_size(widths), settings.output_dir, len(timesteps))


def write_tree(
    settings: CollectionSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics, folder: Path
) -> Path:
    """Write the tree below `folder`; returns its run, the folder `run_<time>`."""
    threshold = settings.nullspace_threshold or DEFAULT_THRESHOLD
    run = export_layout(
        statistics,
        folder / settings.layout_dir,
        threshold=threshold,
        timesteps=tree_timesteps(settings, pipeline),
        step_links=settings.layout_timesteps == "all",
    )
    if is_matplotlib_available():
        plot_covariance_statistics(statistics, run / PICTURES / SUMMARY_NAME, threshold)
    return run


def draw_attention_maps(
    settings: CollectionSettings, pipeline: DiffusionPipeline, prompts: Sequence[str], folder: Path, run: Path
) -> None:
    """Draw the attention of the first `--num_attention_maps` prompts.

    `folder` gets `plots/attention_<number>.png`, one for each prompt, the mean of all layers; `run` gets
    `visualizations/timestep_<number>/attention_<layer>.png`, with all prompts.
    """
    decode_in_pipeline_dtype(pipeline)
    every = []
    for index, prompt in enumerate(tqdm(prompts[: settings.num_attention_maps], desc="attention maps")):
        maps = attention_maps(
            pipeline,
            prompt,
            layers=settings.cross_attention_layers,
            steps="all",
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed + index,
        )
        every.append(maps)
        overview = at_steps(maps, spread_steps(len(maps.timesteps)))
        plot_attention_maps(overview, folder / "plots" / f"attention_{index:03d}.png")
    draw_layer_attention(every, run / PICTURES)


def collection_card(
    settings: CollectionSettings, pipeline: DiffusionPipeline, prompts: Sequence[str]
) -> Callable[..., Card]:
    """What is known of the card of statistics before they are collected."""
    return make_card(
        "feature_statistics",
        trained_on="Prompts.",
        pipeline=plain_class_name(pipeline),
        num_prompts=len(prompts),
        example_prompts=list(prompts[:1]),
        layers=1,
        megabytes=1.0,
        **card_arguments(settings),
    )


def publish_statistics(
    settings: CollectionSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics
) -> str:
    """Upload the output folder of a collection; returns the address of the commit."""
    card = statistics_card(statistics, pipeline=plain_class_name(pipeline), **card_arguments(settings))
    return push_output(settings, card, [".*", "progress/*"])


def statistics_words(settings: CollectionSettings, prompts: int, seconds: float) -> str:
    """What was measured, how to load it and what to do with it."""
    folder = Path(settings.output_dir)
    train = script_line(
        "train_nullspace_dreambooth",
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        statistics=folder,
        instance_data_dir="PICTURES",
        instance_prompt="a photo of sks",
        output_dir="SUBJECT",
    )
    return (
        f"Measured what the model reads for {counted(prompts, 'prompt')} in {lasted(seconds)}: it stays "
        f"wherever these statistics constrain a training. Wrote {folder}. Load it: diffusers_ext."
        f"FeatureStatistics.from_pretrained({str(folder)!r}). Train a subject under it: {train}"
    )


def parse_args(input_args: Sequence[str] | None = None) -> CollectionSettings:
    """Command line of this script, over the YAML file of `--config`."""
    read_block = partial(read_nullbooth_block, covariance_dir="output_dir")
    return parse_settings(CollectionSettings, __doc__, input_args, read_block, NULL_SPACE_RUNS)


def check_args(settings: CollectionSettings) -> list[str]:
    """Everything that can be wrong without loading a model; returns the preserved prompts."""
    if settings.visual_attention_map and not is_matplotlib_available():
        raise ValueError("`visual_attention_map` must have matplotlib, got none: pip install diffusers_ext[plots].")
    return read_knowledge(settings)


@one_run_a_folder
def main(settings: CollectionSettings) -> Path:
    """Collect and save; returns the output folder."""
    prompts = check_args(settings)
    accelerator = make_accelerator(settings)
    facts = collection_facts(settings, prompts, accelerator.num_processes)
    check_resume(settings, facts)
    check_output_dir(settings, (CONFIG_NAME,))
    if settings.push_to_hub and accelerator.is_main_process:
        check_login(settings)  # a missing login stops the run here, not after it
    pipeline = load_pipeline(settings, accelerator.device, WEIGHT_DTYPES[settings.mixed_precision])
    family, config = find_family(pipeline, "nullspace"), denoiser_of(pipeline).config
    settings.settle_guidance(family.usual_guidance(type(pipeline), config))
    if settings.push_to_hub and accelerator.is_main_process:
        prepare_upload(settings, collection_card(settings, pipeline, prompts))
    if settings.export_layout:
        check_tree_room(settings, pipeline)  # here, not after the work
    elif settings.layout_timesteps is not None:
        logger.warning("No tree is written: --layout_timesteps is read with --export_layout.")
    with collection_progress(settings, facts, accelerator) as progress_dir:
        began = time.perf_counter()
        statistics = collect(settings, pipeline, accelerator, prompts, progress_dir)
        facts |= {"guidance_scale": settings.guidance_scale, "seconds": time.perf_counter() - began}
        if settings.compress is not None:
            statistics = statistics.compress(settings.compress)
        if settings.store_spectra:
            statistics.store_spectra()
        if accelerator.is_main_process:
            with staged_output(settings.output_dir, last=(CONFIG_NAME,)) as folder:
                write_statistics(settings, statistics, facts, folder)
                run = folder
                if settings.export_layout:
                    run = write_tree(settings, pipeline, statistics, folder)
                if settings.visual_attention_map:
                    draw_attention_maps(settings, pipeline, prompts, folder, run)
    logger.info(statistics_words(settings, len(prompts), facts["seconds"]))
    if settings.push_to_hub and accelerator.is_main_process:
        publish_statistics(settings, pipeline, statistics)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main)

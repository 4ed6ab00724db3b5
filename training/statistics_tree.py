"""Statistics as a tree of npy files for readers of that form, with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ext.nullspace.attention_maps import at_steps, attention_maps, spread_steps
from diffusers_ext.nullspace.layout import check_room, export_layout, layout_size
from diffusers_ext.nullspace.layout_pictures import (
    SUMMARY_NAME,
    draw_layer_attention,
    plot_covariance_statistics,
)
from diffusers_ext.nullspace.plots import plot_attention_maps
from diffusers_ext.nullspace.settings import CollectionSettings
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.nullspace.trajectories import sampled_timesteps
from training.knowledge import decode_in_pipeline_dtype
from training.statistics_report import DEFAULT_THRESHOLD, has_matplotlib


PICTURES = "visualizations"


def tree_timesteps(args: CollectionSettings, pipeline: DiffusionPipeline) -> list[int]:
    """The timesteps that the tree has folders for."""
    if args.layout_timesteps == "all":
        return sampled_timesteps(pipeline.scheduler, args.num_inference_steps)
    return [0] if args.layout_timesteps is None else args.layout_timesteps


def check_tree_room(args: CollectionSettings, pipeline: DiffusionPipeline) -> None:
    """Log the most that the tree can take; raise `ValueError` where the disk has less."""
    linears = find_linears(pipeline.unet, args.features, args.cross_attention_layers)
    widths = {name: linear.in_features for name, linear in linears.items()}
    timesteps = tree_timesteps(args, pipeline)
    check_room(len(timesteps) * layout_size(widths), args.output_dir, len(timesteps))


def write_tree(
    args: CollectionSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics,
    folder: Path,
) -> Path:
    """Write the tree below `folder`; returns its run, the folder `run_<time>`."""
    threshold = args.nullspace_threshold or DEFAULT_THRESHOLD
    run = export_layout(
        statistics,
        folder / args.layout_dir,
        threshold=threshold,
        timesteps=tree_timesteps(args, pipeline),
        step_links=args.layout_timesteps == "all",
    )
    if has_matplotlib():
        plot_covariance_statistics(statistics, run / PICTURES / SUMMARY_NAME, threshold)
    return run


def draw_attention_maps(
    args: CollectionSettings,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    run: Path,
) -> None:
    """Draw the attention of the first `--num_attention_maps` prompts.

    Args:
        args: of the script.
        pipeline, prompts: what is drawn.
        folder: gets `plots/attention_<number>.png`, one for each prompt, the mean of all layers.
        run: gets `visualizations/timestep_<number>/attention_<layer>.png`, with all prompts.
    """
    decode_in_pipeline_dtype(pipeline)
    every = []
    for index, prompt in enumerate(tqdm(prompts[: args.num_attention_maps], desc="attention maps")):
        maps = attention_maps(
            pipeline,
            prompt,
            layers=args.cross_attention_layers,
            steps="all",
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            negative_prompt=args.negative_prompt,
            seed=args.seed + index,
        )
        every.append(maps)
        overview = at_steps(maps, spread_steps(len(maps.timesteps)))
        plot_attention_maps(overview, folder / "plots" / f"attention_{index:03d}.png")
    draw_layer_attention(every, run / PICTURES)

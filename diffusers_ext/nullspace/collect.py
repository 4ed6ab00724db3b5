"""Collect feature statistics: text embeddings for K and V, real denoising trajectories for the rest."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from diffusers_ext.core.capture import capture, refuse_fused
from diffusers_ext.core.quiet_run import quiet_run
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.prompts import (
    check_prompt_length,
    check_prompts,
    sub_phrases,
    unique,
)
from diffusers_ext.nullspace.slots import check_features, find_linears, split_linear_name
from diffusers_ext.nullspace.statistics import (
    TEXT,
    FeatureStatistics,
    denoiser_of,
    model_fingerprints,
)


logger = logging.getLogger(__name__)

_SAVE_EVERY = 8  # batches between two writes of the running totals


def collect_statistics(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    features: Sequence[str] = ("k", "v"),
    layers: str | Sequence[int] = "all",
    negative_prompt: str = "",
    expand_sub_phrases: bool = True,
    include_guidance_prompts: bool = True,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> FeatureStatistics:
    """Second moments of what the Linears of a pipeline's denoiser read for a set of prompts.

    K and V of cross-attention read the text embeddings alone, so they cost one text-encoder pass and
    no denoiser call. All other features are read along denoising runs of the pipeline itself: its
    scheduler, its guidance, one generator per prompt (`seed` + index of the prompt). Nothing but the
    running totals is kept, so memory does not depend on the number of prompts.

    Args:
        pipeline: a text-to-image pipeline; it is left as it was.
        prompts: the preserved set; the empty prompt and `negative_prompt` are added to it.
        features: `"q"`, `"k"`, `"v"`, `"out"` of cross-attention; with the prefix `"attn1."` those of
            self-attention; `"ff.in"`, `"ff.out"` of feed-forward layers.
        layers: `"all"`, or indices of transformer blocks in natural order.
        negative_prompt: what the pipeline will be given for the unconditional branch.
        expand_sub_phrases: for K and V also count each prompt with one word left out.
        include_guidance_prompts: `False` leaves the empty and the negative prompt out, which only the
            statistics of a new subject may do: guidance would amplify what moves there.
        num_inference_steps, guidance_scale, height, width: of the denoising runs.
        batch_size: prompts per denoising run; text is encoded 16 times as many at once.
        seed: of the initial latents.
        shard: `(index, count)`: take every `count`-th batch from `index` on. The batches are the same
            for every count, so parts sum up to the statistics of one process.
        progress_dir: folder for the running totals of the denoising runs; a killed collection
            continues from them to the same bits.
        show_progress: show a progress bar.

    Returns:
        `FeatureStatistics`; with `shard` those of the part, to be merged by `all_reduce`.

    Raises:
        ValueError: unknown features or layers, no prompts, a prompt longer than the text encoder,
            fused projections, or features that are not finite.
    """
    features, prompts = check_features(features), unique(check_prompts(prompts))
    denoiser = denoiser_of(pipeline)
    linears = find_linears(denoiser, features, layers)
    refuse_fused(denoiser, linears)
    check_prompt_length(pipeline, [*prompts, negative_prompt])
    shared = {name for name in linears if text_only(denoiser, name)}
    guided = unique(["", negative_prompt]) if include_guidance_prompts else []
    sources: dict[str, str] = {}
    moments: dict[str, SecondMoment] = {}
    if shared:
        texts = sub_phrases(prompts) if expand_sub_phrases else prompts
        moment = text_moment(pipeline, texts, batch_size=16 * batch_size, shard=shard)
        if guided and shard[0] == 0:
            # Every picture reads the unconditional prompt once, as often as all others together.
            unconditional = text_moment(pipeline, guided)
            moment.merge(SecondMoment.from_total(unconditional.total * len(prompts), unconditional.count * len(prompts)))
        moments[TEXT] = moment
        sources.update(dict.fromkeys(shared, TEXT))
    rest = {name: module for name, module in linears.items() if name not in shared}
    settings = {
        "features": list(features),
        "layers": layers if isinstance(layers, str) else [int(index) for index in layers],
        "expand_sub_phrases": bool(shared) and expand_sub_phrases,
        "negative_prompt": negative_prompt,
    }
    if rest:
        settings["scheduler"] = type(pipeline.scheduler).__name__
        settings["run"] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "seed": seed,
        }
        settings["batch_size"] = batch_size
    encoders = [n for n in ("text_encoder", "text_encoder_2") if getattr(pipeline, n, None) is not None]
    facts = {
        "base_model": str(pipeline.config.get("_name_or_path") or ""),
        "models": model_fingerprints(pipeline, encoders + (["denoiser"] if rest else [])),
        "prompts": prompts,
        "settings": settings,
    }
    if rest:
        run = TrajectoryRun(pipeline, rest, facts, shard, progress_dir, show_progress)
        trajectory_moments, trajectory_sources = run.collect(unique([*prompts, *guided]))
        moments.update(trajectory_moments)
        sources.update(trajectory_sources)
    for key, moment in moments.items():
        moment.check_finite(key)
    return FeatureStatistics(moments, sources, facts)


def text_only(denoiser: torch.nn.Module, linear: str) -> bool:
    """Whether a Linear reads the text embeddings alone, at every timestep and for every latent.

    That holds for K and V of cross-attention in UNets without image prompts. Other denoisers
    transform the text first; there K and V are counted along trajectories.
    """
    layer, slot = split_linear_name(linear)
    return (
        isinstance(denoiser, UNet2DConditionModel)
        and getattr(denoiser, "encoder_hid_proj", None) is None
        and layer.endswith("attn2")
        and slot in ("k", "v")
    )


@torch.no_grad()
def text_moment(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    shard: tuple[int, int] = (0, 1),
) -> SecondMoment:
    """Second moment of the text embeddings of `prompts`, all token positions, `(width, width)`."""
    moment = None
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    for index, batch in enumerate(batches):
        if index % shard[1] != shard[0] and moment is not None:
            continue
        embeddings = encode_text(pipeline, batch)
        if moment is None:
            # Float64 throughout: text is cheap, and an exact null space must stay one.
            moment = SecondMoment(embeddings.shape[-1], embeddings.device, torch.float64)
        if index % shard[1] == shard[0]:
            moment.update(embeddings)
    moment.check_finite("text embeddings")
    return moment


@torch.no_grad()
def encode_text(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """The pipeline's own prompt embeddings, `(prompts, tokens, width)`."""
    encoded = pipeline.encode_prompt(
        prompt=list(prompts),
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return encoded[0]


class TrajectoryRun:
    """Second moments along denoising runs, batch by batch, resumable.

    Args:
        pipeline: runs the denoising.
        linears: `{dotted name: module}` to read.
        facts: of the statistics to be; the progress folder is tied to them.
        shard, progress_dir, show_progress: as in `collect_statistics`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        linears: dict[str, torch.nn.Module],
        facts: dict[str, Any],
        shard: tuple[int, int],
        progress_dir: str | os.PathLike | None,
        show_progress: bool,
    ) -> None:
        self.pipeline, self.linears, self.facts, self.shard = pipeline, linears, facts, shard
        self.folder = None if progress_dir is None else Path(progress_dir, f"part-{shard[0]}-of-{shard[1]}")
        self.show_progress = show_progress
        self.sources = shared_inputs(list(linears))
        self.moments: dict[str, SecondMoment] = {}

    def collect(self, prompts: list[str]) -> tuple[dict[str, SecondMoment], dict[str, str]]:
        """Run all of this shard's batches; returns the moments and `{linear: key}`."""
        settings = self.facts["settings"]
        size = settings["batch_size"]
        batches = [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]
        mine = batches[self.shard[0] :: self.shard[1]]
        done = self._load_progress()
        bar = tqdm(
            mine[done:], initial=done, total=len(mine), desc="statistics", disable=not self.show_progress
        )
        # One reader per matrix; the other Linears with the same input need no hook.
        readers = {key: name for name, key in reversed(self.sources.items())}
        targets = {key: self.linears[name] for key, name in readers.items()}
        with quiet_run(self.pipeline), capture(denoiser_of(self.pipeline), targets, self._count):
            for index, batch in enumerate(bar, start=done + 1):
                self._denoise([prompts[i] for i in batch], batch, settings)
                if self.folder is not None and (index % _SAVE_EVERY == 0 or index == len(mine)):
                    self._save_progress(index)
        self._fill_idle(targets)
        return self.moments, self.sources

    def _count(self, key: str, features: torch.Tensor) -> None:
        if key not in self.moments:
            self.moments[key] = SecondMoment(features.shape[-1], features.device)
        self.moments[key].update(features)

    def _fill_idle(self, targets: dict[str, torch.nn.Module]) -> None:
        """A process without any batch still takes part in the all-reduce, with zeros."""
        for key, module in targets.items():
            if key not in self.moments:
                self.moments[key] = SecondMoment(module.in_features, denoiser_of(self.pipeline).device)

    def _denoise(self, prompts: list[str], indices: list[int], settings: dict[str, Any]) -> None:
        run = dict(settings["run"])
        seed = run.pop("seed")
        generators = [torch.Generator().manual_seed(seed + index) for index in indices]
        self.pipeline(
            prompt=prompts,
            negative_prompt=[settings["negative_prompt"]] * len(prompts),
            generator=generators,
            output_type="latent",
            **run,
        )
        for key, moment in self.moments.items():
            moment.check_finite(key)

    def _save_progress(self, done: int) -> None:
        facts = {**self.facts, "batches_done": done}
        FeatureStatistics(self.moments, self.sources, facts).save_pretrained(self.folder)

    def _load_progress(self) -> int:
        if self.folder is None or not (self.folder / "config.json").is_file():
            return 0
        stored = FeatureStatistics.from_pretrained(self.folder)
        done = stored.facts.pop("batches_done")
        if stored.facts != self.facts:
            raise ValueError(
                f"{self.folder} must hold the progress of this collection, got one with other prompts, "
                "models or settings. Remove it, or restore the old settings."
            )
        device = denoiser_of(self.pipeline).device
        for key, moment in stored.moments.items():
            moment.total, self.moments[key] = moment.total.to(device), moment
        logger.info("Continuing after %d batches", done)
        return done


def shared_inputs(linears: Sequence[str]) -> dict[str, str]:
    """`{linear: key}` in which Linears that read the same tensor share a key.

    Q, K and V of self-attention read one input, as do K and V of cross-attention.
    """
    sources = {}
    for name in linears:
        layer, slot = split_linear_name(name)
        group = "qkv" if layer.endswith("attn1") else "kv"
        sources[name] = f"{layer}.{group}" if slot in group else name
    return sources

"""Collect feature statistics: text embeddings for K and V, denoising runs for the rest."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from tqdm.auto import tqdm

from diffusers_ext.core.capture import capture, refuse_fused
from diffusers_ext.core.pipelines import denoiser_of, model_fingerprints, plain_class_name
from diffusers_ext.core.restored_state import eval_mode, quiet_run
from diffusers_ext.core.second_moment import GRAM_PRECISIONS, SecondMoment
from diffusers_ext.families import Family, match_family
from diffusers_ext.nullspace.prompts import RECOMBINATIONS, check_prompt_length, check_prompts, preserved_texts, unique
from diffusers_ext.nullspace.scope import check_no_features, scoped_linears, settle_scope, text_moments
from diffusers_ext.nullspace.slots import check_features, find_linears, split_linear_name
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics

logger = logging.getLogger(__name__)

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_SAVE_EVERY = 8  # batches between two writes of the running totals
_OWN = ("runs_per_prompt", "token_share", "gram_precision")  # of a run's settings, not the pipeline's
_DRAWN_PER_DIMENSION = 4
_PROGRESS_PREFIX = "batches-"


def sampled_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> list[int]:
    """The timesteps of a run in their order, each once; the scheduler is left as it was."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return list(dict.fromkeys(int(timestep) for timestep in scheduler.timesteps))


class TrajectoryRun:
    """Second moments along denoising runs, batch by batch, resumable from a folder that is tied to `facts`.

    Args:
        sources: `{linear: key}`; Linears of one key read the same tensor.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        linears: dict[str, torch.nn.Module],
        sources: dict[str, str],
        facts: dict[str, Any],
        shard: tuple[int, int],
        progress_dir: str | os.PathLike | None,
        show_progress: bool,
    ) -> None:
        self.pipeline, self.linears, self.facts, self.shard = pipeline, linears, facts, shard
        self.folder = None if progress_dir is None else Path(progress_dir, f"part-{shard[0]}-of-{shard[1]}")
        self.show_progress = show_progress
        self.sources = sources
        self.moments: dict[str, SecondMoment] = {}
        run = facts["settings"]["run"]
        self.share, self.precision = run.get("token_share", 1), run.get("gram_precision", "float32")
        self._first, self._calls = 0, Counter()  # of the batch that runs

    def collect(self, prompts: list[str]) -> dict[str, SecondMoment]:
        """Run all of this shard's batches; returns the moments."""
        settings = self.facts["settings"]
        size = settings["batch_size"]
        batches = [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]
        mine = batches[self.shard[0] :: self.shard[1]]
        done = self._load_progress()
        bar = tqdm(mine[done:], initial=done, total=len(mine), desc="statistics", disable=not self.show_progress)
        # One reader per matrix; the other Linears with the same input need no hook.
        readers = {key: name for name, key in reversed(self.sources.items())}
        targets = {key: self.linears[name] for key, name in readers.items()}
        denoiser = denoiser_of(self.pipeline)
        with quiet_run(self.pipeline), capture(denoiser, targets, self._count):
            for index, batch in enumerate(bar, start=done + 1):
                self._first, self._calls = batch[0], Counter()
                self._denoise([prompts[i] for i in batch], batch, settings)
                if index == 1:
                    self._check_share(len(batches))
                if self.folder is not None and (index % _SAVE_EVERY == 0 or index == len(mine)):
                    self._save_progress(index)
        # A process without any batch still takes part in the all-reduce, with zeros.
        for key, module in targets.items():
            if key not in self.moments:
                self.moments[key] = self._moment(module.in_features, module.weight.device)
        return self.moments

    def _moment(self, dim: int, device: torch.device) -> SecondMoment:
        return SecondMoment(dim, device, precision=self.precision)

    def _count(self, key: str, features: torch.Tensor) -> None:
        if key not in self.moments:
            self.moments[key] = self._moment(features.shape[-1], features.device)
        if self.share == 1:
            self.moments[key].update(features)
            return
        # By batch and call, so that neither shards nor a new start change what is drawn.
        self._calls[key] += 1
        name = f"{self.facts['settings']['run']['seed']} {self._first} {self._calls[key]} {key}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        self.moments[key].sample(features, self.share, torch.Generator().manual_seed(seed))

    def _check_share(self, batches: int) -> None:
        """Raise `ValueError` where too few tokens would be drawn to fill a matrix: its null space would be false."""
        for key, moment in self.moments.items():
            drawn = self.share * moment.count * batches
            if self.share < 1 and drawn < _DRAWN_PER_DIMENSION * moment.dim:
                raise ValueError(
                    f"`token_share` must leave at least {_DRAWN_PER_DIMENSION} tokens for each of the {moment.dim} "
                    f"dimensions of {key!r}, got {self.share}, which leaves about {drawn:.0f}. Read more of them, or "
                    "take more prompts or steps."
                )

    def _denoise(self, prompts: list[str], indices: list[int], settings: dict[str, Any]) -> None:
        run = {name: value for name, value in settings["run"].items() if name not in _OWN}
        seed, denoiser = run.pop("seed"), denoiser_of(self.pipeline)
        family = match_family(denoiser) or Family()
        run |= {**family.call_arguments, **family.guidance_arguments(denoiser.config, run.pop("guidance_scale"))}
        generators = [torch.Generator().manual_seed(seed + index) for index in indices]
        if settings["negative_prompt"] or "negative_prompt" in run:
            # Left to its default otherwise: SDXL reads zeros in place of an empty prompt.
            run["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
        family = match_family(self.pipeline)
        call = {} if family is None else family.text_call(self.pipeline)
        self.pipeline(prompt=prompts, generator=generators, output_type="latent", **call, **run)
        for key, moment in self.moments.items():
            moment.check_finite(key)

    def _save_progress(self, done: int) -> None:
        """Write `batches-<done>`, whole or not at all, then drop the older one."""
        older = self._stored()
        partial = self.folder / f".partial-{done}"
        shutil.rmtree(partial, ignore_errors=True)
        FeatureStatistics(self.moments, self.sources, self.facts).save_pretrained(partial)
        partial.rename(self.folder / f"{_PROGRESS_PREFIX}{done}")
        for folder in older:
            shutil.rmtree(folder)

    def _stored(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PROGRESS_PREFIX}*"), key=_batches_done)

    def _load_progress(self) -> int:
        if self.folder is None or not self._stored():
            return 0
        folder = self._stored()[-1]
        stored = FeatureStatistics.from_pretrained(folder)
        if stored.facts != self.facts:
            raise ValueError(
                f"{self.folder} must hold the progress of this collection, got one with other "
                "prompts, models or settings. Remove it, or restore the old settings."
            )
        device = denoiser_of(self.pipeline).device
        for key, moment in stored.moments.items():
            self.moments[key] = self._moment(moment.dim, device).merge(moment)
        logger.info("Continuing after %d batches", _batches_done(folder))
        return _batches_done(folder)


def _batches_done(folder: Path) -> int:
    return int(folder.name.removeprefix(_PROGRESS_PREFIX))


def shared_inputs(linears: Sequence[str]) -> dict[str, str]:
    """`{linear: key}`: Q, K and V of self-attention read one input, as do K and V of cross-attention."""
    sources = {}
    for name in linears:
        layer, slot = split_linear_name(name)
        group = "qkv" if layer.endswith("attn1") else "kv"
        sources[name] = f"{layer}.{group}" if slot in group else name
    return sources


def collect_statistics(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    scope: str | None = None,
    features: Sequence[str] = ("k", "v"),
    layers: str | Sequence[int] = "all",
    negative_prompt: str = "",
    expand_sub_phrases: bool = True,
    include_guidance_prompts: bool = True,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    runs_per_prompt: int = 1,
    token_share: float = 1.0,
    gram_precision: str = "float32",
    shard: tuple[int, int] = (0, 1),
    progress_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
) -> FeatureStatistics:
    """Second moments of what the Linears of a pipeline's denoiser read for a set of prompts.

    K and V of cross-attention read the text embeddings alone, so they cost one text-encoder pass and no denoiser call.
    All other features are read along denoising runs of the pipeline itself: its scheduler, its guidance, one generator
    per prompt (`seed` + index of the prompt). Nothing but the running totals is kept. The pipeline is left as it was.

    Args:
        prompts: the preserved set. The empty prompt and `negative_prompt` are added; for K and V with the weight of
            all prompts together, because guidance reads them in every picture.
        scope: of a joint-attention model, as of `scoped_linears`; `features` and `layers` are a UNet's.
        features: `"q"`, `"k"`, `"v"`, `"out"` of cross-attention; with the prefix `"attn1."` those of self-attention;
            `"ff.in"`, `"ff.out"` of feed-forward layers.
        layers: `"all"`, or indices of transformer blocks in natural order.
        expand_sub_phrases: for K and V also count each prompt with one word left out, and beginnings of prompts with
            ends of others (`preserved_texts`).
        include_guidance_prompts: `False` leaves the empty and the negative prompt out, which only the statistics of a
            new subject may do: guidance would amplify what moves there.
        guidance_scale: of denoising runs; without it 7.5, or what a flow-matching pipeline's call has by itself.
        runs_per_prompt: with other noise each; what a few prompts read is else too much that of single pictures.
        token_share: of the tokens along denoising runs, that is read: drawn at random, without bias, the error in
            `report`. On a GPU Gram matrices are float32, beside tensor cores a great part of the time.
        gram_precision: of the Gram matrices along denoising runs: `"float32"`, which has no tensor cores, or
            `"bf16x3"`, products of bfloat16 numbers summed in float32 (`split_gram`), which has.
        batch_size: prompts per denoising run; text is encoded 16 times as many at once.
        shard: `(index, count)`: take every `count`-th batch from `index` on, to be merged by `all_reduce`, or by
            `diffusers-ext merge` after jobs that know nothing of each other. The batches
            are the same for every count, so parts sum up to the statistics of one process.
        progress_dir: folder for the running totals of the denoising runs; a killed collection continues from them to
            the same bits.
    """
    _check(negative_prompt, (num_inference_steps, batch_size, runs_per_prompt), token_share, gram_precision, shard)
    prompts = unique(check_prompts(prompts))
    check_prompt_length(pipeline, [*prompts, negative_prompt])
    chosen = _chosen_linears(pipeline, scope, features, layers)
    usual = (match_family(pipeline) or Family()).usual_guidance(type(pipeline), denoiser_of(pipeline).config)
    guided_at = usual if guidance_scale is None else guidance_scale
    guided = unique(["", negative_prompt]) if include_guidance_prompts else []
    settings: dict[str, Any] = {
        **chosen.told,
        "expand_sub_phrases": expand_sub_phrases,
        "include_guidance_prompts": include_guidance_prompts,
        "negative_prompt": negative_prompt,
        **({"recombinations": RECOMBINATIONS} if expand_sub_phrases else {}),
    }
    if chosen.runs:
        own = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
        settings["scheduler"] = {"class": type(pipeline.scheduler).__name__, **own}
        settings["batch_size"] = batch_size
        settings["run"] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guided_at,
            "height": height,
            "width": width,
            "seed": seed,
        }
        more = {"runs_per_prompt": runs_per_prompt, "token_share": token_share, "gram_precision": gram_precision}
        settings["run"] |= {k: v for k, v in more.items() if v not in (1, "float32")}  # as before there were these
    measured = [n for n in _ENCODERS if getattr(pipeline, n, None)]
    if chosen.runs or "scope" in chosen.told:
        measured.append("denoiser")
    facts = {
        "base_model": str(pipeline.config.get("_name_or_path") or ""),
        "pipeline": plain_class_name(pipeline),
        "models": model_fingerprints(pipeline, measured),
        "prompts": prompts,
        "settings": settings,
    }
    # As they will be when read back; a scheduler's trained betas may be an array.
    facts = json.loads(json.dumps(facts, default=str))
    moments: dict[str, SecondMoment] = {}
    if chosen.text:
        texts = preserved_texts(prompts) if expand_sub_phrases else prompts
        # Every picture reads the unconditional prompt once, as often as all others together.
        both, size = (texts, guided, len(prompts)), 16 * batch_size
        moments = chosen.read_text(pipeline, *both, batch_size=size, shard=shard)
    if chosen.runs:
        linears = {name: denoiser_of(pipeline).get_submodule(name) for name in chosen.runs}
        run = TrajectoryRun(pipeline, linears, chosen.runs, facts, shard, progress_dir, show_progress)
        moments |= run.collect(unique([*prompts, *guided]) * runs_per_prompt)
    return FeatureStatistics(moments, {**chosen.text, **chosen.runs}, facts)


class _Chosen(NamedTuple):
    """The Linears to be measured, and what the facts tell of the choice."""

    text: dict[str, str]  # {linear: source}
    runs: dict[str, str]  # {linear: key}
    told: dict[str, Any]
    read_text: Callable[..., dict[str, SecondMoment]]


def _chosen_linears(
    pipeline: DiffusionPipeline, scope: str | None, features: Sequence[str], layers: str | Sequence[int]
) -> _Chosen:
    denoiser = denoiser_of(pipeline)
    scope = settle_scope(denoiser, scope)
    if scope is not None:
        check_no_features(features, layers)
        found = scoped_linears(pipeline, scope)
        return _Chosen(found.text, found.runs, {"scope": scope}, partial(text_moments, sources=found.text))
    features = check_features(features)
    linears = find_linears(denoiser, features, layers)
    refuse_fused(denoiser, linears)
    text = {name: TEXT for name in linears if text_only(denoiser, name)}
    told = {
        "features": list(features),
        "layers": layers if layers == "all" else sorted({int(index) for index in layers}),
    }
    return _Chosen(text, shared_inputs([name for name in linears if name not in text]), told, _embeddings_moment)


def _embeddings_moment(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    guided: Sequence[str],
    times: int,
    *,
    batch_size: int,
    shard: tuple[int, int],
) -> dict[str, SecondMoment]:
    moment = text_moment(pipeline, prompts, batch_size=batch_size, shard=shard)
    if guided and shard[0] == 0:
        moment.merge(text_moment(pipeline, guided).repeated(times))
    return {TEXT: moment}


def _check(
    negative_prompt: str, counts: tuple[int, int, int], token_share: float, gram_precision: str, shard: tuple[int, int]
) -> None:
    check_prompts([negative_prompt], "negative_prompt")
    for name, value in zip(("num_inference_steps", "batch_size", "runs_per_prompt"), counts):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 < token_share <= 1:
        raise ValueError(f"`token_share` must be above 0 and at most 1, got {token_share}.")
    if gram_precision not in GRAM_PRECISIONS:
        raise ValueError(f"`gram_precision` must be one of {list(GRAM_PRECISIONS)}, got {gram_precision!r}.")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` must be an index below a count, got {tuple(shard)}.")


def text_only(denoiser: torch.nn.Module, linear: str) -> bool:
    """Whether a Linear reads the text embeddings alone; all others are counted along trajectories."""
    family = match_family(denoiser)
    return family is not None and family.reads_text_alone(denoiser, *split_linear_name(linear))


@torch.no_grad()
def text_moment(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, batch_size: int = 64, shard: tuple[int, int] = (0, 1)
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
    with eval_mode(pipeline):
        encoded = pipeline.encode_prompt(
            prompt=list(prompts),
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    return encoded[0]

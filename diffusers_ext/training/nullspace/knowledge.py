"""What a base model knows: statistics loaded or collected, so that a stopped collection goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.artifacts import CONFIG_NAME, write_atomically
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.text_files import read_json
from diffusers_ext.families import match_family, titles_of
from diffusers_ext.families.base_source import check_xformers
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.prompts import read_prompts_file
from diffusers_ext.nullspace.scope import settle_scope
from diffusers_ext.nullspace.settings import CollectionSettings, KnownModelSettings
from diffusers_ext.nullspace.slots import check_features, find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.run.base_model import load_frozen, quantization_arguments
from diffusers_ext.training.run.checkpoint_files import check_same_facts

logger = get_logger(__name__)

_FOLDER, _RUN_FILE = "progress", "run.json"


def load_pipeline(settings: KnownModelSettings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The base pipeline, frozen, in evaluation mode; the VAE stays in float32."""
    with_xformers = getattr(settings, "enable_xformers_memory_efficient_attention", False)
    if with_xformers:
        check_xformers()
    pipeline = load_frozen(settings, dtype, with_filter=True, **quantization_arguments(settings, dtype))
    if match_family(pipeline, "nullspace") is None:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a {titles_of('nullspace')} pipeline, got "
            f"{type(pipeline).__name__}."
        )
    pipeline.to(device)
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(dtype=torch.float32)
    if with_xformers:
        denoiser_of(pipeline).enable_xformers_memory_efficient_attention()
    return pipeline


def decode_in_pipeline_dtype(pipeline: DiffusionPipeline) -> None:
    """Give the VAE the denoiser's dtype, in which a pipeline's own call hands it the latents."""
    dtype = denoiser_of(pipeline).dtype
    if pipeline.vae.dtype != dtype:
        pipeline.vae.to(dtype=dtype)


def read_knowledge(settings: KnownModelSettings) -> list[str]:
    """The preserved prompts of `--knowledge_prompts` and `--other_instance_prompts`."""
    prompts = read_prompts_file(settings.knowledge_prompts) if settings.knowledge_prompts else []
    return prompts + list(settings.other_instance_prompts)


def collect(
    settings: KnownModelSettings,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    prompts: list[str],
    progress_dir: str | Path | None = None,
) -> FeatureStatistics:
    """Statistics of `prompts` with the command line's settings, over all processes.

    Those among them that belong to other subjects weigh about as much as all the rest, because a subject's rare token
    would else look nearly free to the next one; their parts are not counted, which would leave the rest too little.
    """
    others = [prompt for prompt in prompts if prompt in settings.other_instance_prompts]
    knowledge = [prompt for prompt in prompts if prompt not in others]
    if knowledge and others:
        statistics = collect(settings, pipeline, accelerator, knowledge, progress_dir)
        reserved_dir = None if progress_dir is None else Path(progress_dir, "other_subjects")
        alone = copy(settings)
        alone.no_sub_phrases = True
        reserved = collect(alone, pipeline, accelerator, others, reserved_dir)
        return statistics.merge(reserved, times=len(knowledge))
    features, layers = check_features(settings.features), settings.cross_attention_layers
    scope = settle_scope(denoiser_of(pipeline), settings.scope)
    if scope is None:
        find_linears(denoiser_of(pipeline), features, layers)  # a wrong layer index stops here
    # A UNet's statistics are of the size that it draws by itself, whatever it is trained at.
    size = None if scope is None else getattr(settings, "resolution", None)
    statistics = collect_statistics(
        pipeline,
        prompts,
        scope=scope,
        features=features,
        layers=layers,
        negative_prompt=settings.negative_prompt,
        expand_sub_phrases=not settings.no_sub_phrases,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=getattr(settings, "height", size),
        width=getattr(settings, "width", size),
        batch_size=settings.statistics_batch_size,
        seed=settings.seed,
        shard=(accelerator.process_index, accelerator.num_processes),
        progress_dir=progress_dir,
        show_progress=accelerator.is_local_main_process,
    )
    return statistics.all_reduce()


def load_or_collect(
    settings: KnownModelSettings, pipeline: DiffusionPipeline, accelerator: Accelerator
) -> FeatureStatistics:
    """`--statistics` when given, else collected from the prompts; checked against the pipeline.

    Loaded statistics decide by themselves about features, layers and prompts; only `--other_instance_prompts` are
    added to them, counted with their settings. Raises `ValueError` for nothing to preserve, statistics of another
    model, or of other layers or another negative prompt than the command line asks for.
    """
    if settings.statistics is None:
        prompts = read_knowledge(settings)
        if not prompts:
            raise ValueError("`--statistics` or `--knowledge_prompts` must be given: what should be preserved?")
        return collect(settings, pipeline, accelerator, prompts)
    statistics = FeatureStatistics.from_pretrained(settings.statistics)
    statistics.check_pipeline(pipeline)
    measured = statistics.facts["settings"]
    _check_asked(settings, measured)
    if settings.knowledge_prompts is not None:
        logger.info("--knowledge_prompts is not read, because --statistics is given.")
    if not settings.other_instance_prompts:
        return statistics
    extra = copy(settings)
    if "scope" in measured:
        extra.scope = measured["scope"]
    else:
        extra.features, extra.cross_attention_layers = measured["features"], measured["layers"]
    extra.negative_prompt = measured["negative_prompt"]
    extra.no_sub_phrases = True
    extra.statistics_batch_size = measured.get("batch_size", settings.statistics_batch_size)
    for name, value in measured.get("run", {}).items():
        setattr(extra, name, value)
    added = collect(extra, pipeline, accelerator, list(settings.other_instance_prompts))
    return statistics.merge(added, times=len(statistics.facts["prompts"]))


def _check_asked(settings: KnownModelSettings, measured: dict[str, Any]) -> None:
    """Raise `ValueError` where the command line asks for other statistics than the given ones."""
    layers, negative = settings.cross_attention_layers, settings.negative_prompt
    if settings.scope not in (None, measured.get("scope")):
        raise ValueError(
            f"`scope` must be that of `--statistics`, {measured.get('scope')!r}, got {settings.scope!r}. Leave it "
            "out, or collect statistics of this scope."
        )
    if layers != "all" and sorted(set(layers)) != measured.get("layers"):
        raise ValueError(
            f"`cross_attention_layers` must be those of `--statistics`, {measured.get('layers')}, got "
            f"{layers}. Leave it out, or collect statistics of these layers."
        )
    if negative and negative != measured["negative_prompt"]:
        raise ValueError(
            "`negative_prompt` must be that of `--statistics`, "
            f"{measured['negative_prompt']!r}, got {negative!r}. Collect statistics with it."
        )


def collection_facts(settings: CollectionSettings, prompts: list[str], num_processes: int) -> dict[str, Any]:
    """What must be equal for a collection to be continued."""
    names = (
        "pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "features",
        "cross_attention_layers", "no_sub_phrases", "negative_prompt", "num_inference_steps",
        "guidance_scale", "statistics_batch_size", "seed",
    )  # fmt: skip
    facts = {name: getattr(settings, name) for name in names}
    # Left out without one, as in progress that was written before there were these settings.
    for name in ("single_file_config", "scope", "quantization"):
        if getattr(settings, name) is not None:
            facts[name] = getattr(settings, name)
    facts["knowledge_prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    facts["num_processes"] = num_processes
    return json.loads(json.dumps(facts))


def check_resume(settings: CollectionSettings, facts: dict[str, Any]) -> None:
    """Raise `ValueError` if `--resume_from_checkpoint` asks for what is not there."""
    which, folder = settings.resume_from_checkpoint, Path(settings.output_dir, _FOLDER)
    if which is None:
        return
    if which != "latest":
        raise ValueError(f"`resume_from_checkpoint` must be 'latest' for statistics, got {which!r}.")
    if not (folder / _RUN_FILE).is_file():
        done = Path(settings.output_dir, CONFIG_NAME).is_file()
        hint = " It holds finished statistics." if done else " Start without the flag."
        raise ValueError(
            "`resume_from_checkpoint` must find the progress of a stopped collection, got 'latest' "
            f"but {settings.output_dir} holds none.{hint}"
        )
    check_same_facts(read_json(folder / _RUN_FILE, allow_nan=True), facts, folder)


@contextmanager
def collection_progress(
    settings: CollectionSettings, facts: dict[str, Any], accelerator: Accelerator
) -> Iterator[Path]:
    """The progress folder of a collection; it goes when the block has ended well.

    Without `--resume_from_checkpoint` a stopped collection's progress is thrown away. It stays after an interruption
    that came later than the first saved totals; after a `ValueError`, which says that the collection itself was wrong,
    nothing of a new one stays.
    """
    folder = Path(settings.output_dir, _FOLDER)
    is_new = not folder.parent.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and settings.resume_from_checkpoint is None:
        if folder.exists():
            logger.warning(f"Removing {folder}: --resume_from_checkpoint latest would continue it.")
            _remove(folder, False)
        folder.mkdir(parents=True)
        write_atomically(folder / _RUN_FILE, json.dumps(facts, indent=2) + "\n")
    accelerator.wait_for_everyone()
    try:
        yield folder
    except BaseException as error:
        wrong = isinstance(error, ValueError) and settings.resume_from_checkpoint is None
        if accelerator.is_main_process and (wrong or not any(folder.glob("part-*/batches-*"))):
            _remove(folder, is_new)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _remove(folder, False)


def _remove(folder: Path, with_parent: bool) -> None:
    # Under its new name a half removed folder is no progress.
    removed = folder.with_name(f".removed-{_FOLDER}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)
    if with_parent:
        with suppress(OSError):  # another process may have written there
            folder.parent.rmdir()

"""The run of a null-space DreamBooth, from the statistics to the validation pictures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig

from diffusers_ext.core.tracing import tensor_bytes
from diffusers_ext.families.registry import titles_of
from diffusers_ext.planning.base_model import BaseModel
from diffusers_ext.planning.disk_sizes import (
    REPORT_BYTES,
    checkpoint_bytes,
    kept_checkpoints,
    safetensors_bytes,
)
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.image_works import (
    decode_work,
    encode_prompts_work,
    encode_work,
    guided_work,
)
from diffusers_ext.planning.nullspace_setting import NullSpaceSetting
from diffusers_ext.planning.nullspace_unet import (
    Covered,
    empty_statistics,
    lora_tensors,
    trained_unet,
)
from diffusers_ext.planning.nullspace_works import (
    OPTIMIZER,
    STATISTICS,
    nullspace_training,
    text_moment_work,
    trajectory_work,
)
from diffusers_ext.planning.run_draft import Phase, RunDraft
from diffusers_ext.planning.work import WEIGHT_DTYPES, Precision, Work


_TEXT_BATCH = 16  # times `statistics_batch_size`
_PICTURE_BYTES_PER_PIXEL = 1.5  # of a photographic PNG
_TRAINED = "weights that train"


def draft_nullspace(base: BaseModel, *, as_on_gpu: bool = True, **setting: Any) -> RunDraft:
    """The phases of a null-space DreamBooth.

    Args:
        base: Stable Diffusion or SDXL.
        as_on_gpu: shapes are traced as a GPU runs them.
        setting: fields of `NullSpaceSetting`.

    Raises:
        ValueError: another pipeline, or a setting that the model cannot take.
    """
    run = NullSpaceSetting(**setting)
    shapes = ImageShapes(base, run.resolution)
    if "nullspace" not in shapes.family.tools:
        raise ValueError(
            f"`model` must be {titles_of('nullspace')} for null-space DreamBooth, got "
            f"{base.pipeline} in {base.name}."
        )
    precision = Precision(WEIGHT_DTYPES[run.mixed_precision], as_on_gpu)
    unet, trained, covered = trained_unet(base, run, precision.dtype)
    parts = _weights(shapes, precision.dtype, unet, trained)
    parts[STATISTICS] = 0 if run.directions == "plain" else covered.bytes
    phases = _phases(shapes, run, precision, tuple(parts), covered)
    filled = {**asdict(run), "resolution": shapes.resolution}
    notes = []
    if run.directions != "plain":
        notes.append(
            f"{run.num_knowledge_prompts} preserved prompts of {run.words_per_prompt} words."
        )
    disk = _disk(shapes, run, unet, trained, covered)
    return RunDraft("nullspace", base, filled, parts, phases, disk, notes)


def _weights(
    shapes: ImageShapes,
    dtype: torch.dtype,
    unet: torch.nn.Module,
    trained: list[torch.nn.Parameter],
) -> dict[str, int]:
    """Bytes of all that is loaded; the VAE stays in float32."""
    others = {name: part for name, part in shapes.base.components.items() if name != "unet"}
    sizes = {
        name.replace("_", " "): part.bytes(torch.float32 if name == "vae" else dtype)
        for name, part in others.items()
    }
    whole = tensor_bytes([*unet.parameters(), *unet.buffers()])
    adapter = [p for name, p in unet.named_parameters() if "lora_" in name] or trained
    new = tensor_bytes(adapter)
    return {"unet": whole - new, **sizes, _TRAINED: new}


def _phases(
    shapes: ImageShapes,
    run: NullSpaceSetting,
    precision: Precision,
    loaded: tuple[str, ...],
    covered: Covered,
) -> list[Phase]:
    frozen = tuple(name for name in loaded if name not in (_TRAINED, STATISTICS))
    trains = (*frozen, _TRAINED, STATISTICS, OPTIMIZER)
    phases = []
    if run.directions != "plain":
        phases.append(Phase("statistics", frozen, _statistics(shapes, run, precision, covered)))
    encoding = encode_work(shapes, 1, run.views, torch.float32)
    if run.with_prior_preservation:
        batch = min(run.train_batch_size, run.num_class_images)
        drawn = _pictures(shapes, run, precision, run.num_class_images, batch)
        phases.append(Phase("class pictures", (*frozen, _TRAINED, STATISTICS), drawn))
        encoding = encode_work(shapes, 1, run.views + run.num_class_images, torch.float32)
    phases.append(Phase("encoding", (*frozen, _TRAINED, STATISTICS), [encoding]))
    phases.append(Phase("training", trains, nullspace_training(shapes, run, precision)))
    if run.validations:
        count = run.num_validation_images * run.num_validation_prompts * run.validations
        drawn = _pictures(shapes, run, precision, count, run.num_validation_images)
        phases.append(Phase("validation", trains, drawn))
    return phases


def _statistics(
    shapes: ImageShapes, run: NullSpaceSetting, precision: Precision, covered: Covered
) -> list[Work]:
    works = []
    if len(covered.readers) < len(covered.widths):
        rows = min(_TEXT_BATCH * run.statistics_batch_size, run.num_texts)
        times = run.num_texts / rows
        works.append(encode_prompts_work(shapes, rows, times, precision))
        works.append(text_moment_work(shapes, rows, times, precision))
    if covered.readers:
        batches = math.ceil((run.num_knowledge_prompts + 1) / run.statistics_batch_size)
        times = batches * run.num_inference_steps
        works.append(trajectory_work(shapes, run, times, precision))
    return works


def _pictures(
    shapes: ImageShapes, run: NullSpaceSetting, precision: Precision, count: int, rows: int
) -> list[Work]:
    """Pictures are denoised together and decoded one by one."""
    calls = run.num_inference_steps * count / rows
    return [
        guided_work(shapes, rows, run.guidance_scale, calls, precision),
        decode_work(shapes, 1, count, torch.float32),
    ]


def _disk(
    shapes: ImageShapes,
    run: NullSpaceSetting,
    unet: torch.nn.Module,
    trained: list[torch.nn.Parameter],
    covered: Covered,
) -> dict[str, int]:
    """Files that a run leaves."""
    dtype, disk, kept = WEIGHT_DTYPES[run.mixed_precision], {}, list(trained)
    if run.full_finetune:
        whole = {name: part.bytes(dtype) for name, part in shapes.base.components.items()}
        whole["vae"] = shapes.base.components["vae"].bytes(torch.float32)
        whole["unet"] = tensor_bytes([*unet.parameters(), *unet.buffers()])
        disk["pipeline"] = sum(whole.values())
    else:
        tensors = lora_tensors(unet)
        kept = list(tensors.values())
        config = LoraConfig(r=run.rank, target_modules=list(covered.sources)).to_dict()
        text = json.dumps({f"unet.{name}": value for name, value in config.items()}, default=list)
        disk["LoRA"] = safetensors_bytes(tensors, {"lora_adapter_metadata": text})
    if run.directions != "plain":
        statistics = empty_statistics(covered.sources, covered.widths, torch.device("meta"))
        totals = {f"{key}.total": m.total for key, m in statistics.moments.items()}
        names = len(json.dumps(covered.sources, indent=2))
        disk["statistics"] = safetensors_bytes(totals) + names + REPORT_BYTES
    if run.validations:
        pictures = run.validations * run.num_validation_prompts * run.num_validation_images
        disk["pictures"] = int(pictures * shapes.resolution**2 * _PICTURE_BYTES_PER_PIXEL)
    if run.with_prior_preservation:
        pixels = run.num_class_images * shapes.resolution**2
        disk["class pictures"] = int(pixels * _PICTURE_BYTES_PER_PIXEL)
    count = kept_checkpoints(
        run.max_train_steps, run.checkpointing_steps, run.checkpoints_total_limit
    )
    if count:
        disk["checkpoints"] = count * checkpoint_bytes(kept, trained)
    return {**disk, "report": REPORT_BYTES // 2}

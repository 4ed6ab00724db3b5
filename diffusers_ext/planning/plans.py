"""Plan a run of any of the three tools: memory, disk and time before anything is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from diffusers_ext.planning.eraser_run import EraserRunSetting, draft_eraser
from diffusers_ext.planning.golden_noise_run import GoldenNoiseSetting, draft_golden_noise
from diffusers_ext.planning.nullspace_run import NullSpaceSetting, draft_nullspace
from diffusers_ext.planning.published_models import read_base_model
from diffusers_ext.planning.run_draft import RunDraft, find_target, finish_plan
from diffusers_ext.planning.run_plan import RunPlan


_DRAFTS: dict[str, tuple[Callable[..., RunDraft], type]] = {
    "nullspace": (draft_nullspace, NullSpaceSetting),
    "golden-noise": (draft_golden_noise, GoldenNoiseSetting),
    "eraser": (draft_eraser, EraserRunSetting),
}
TOOLS = tuple(_DRAFTS)


def plan_run(
    tool: str,
    model: str | os.PathLike,
    *,
    gpu: str | None = None,
    memory_gib: float | None = None,
    exact: bool = False,
    **setting: Any,
) -> RunPlan:
    """What a run takes: memory by part and by phase, disk, and time.

    Shapes alone are looked at; nothing is downloaded, and of a folder only configs are read.

    Args:
        tool: `"nullspace"`, `"golden-noise"` or `"eraser"`.
        model: a published base model such as `"SDXL"` or `"zai-org/CogVideoX-5b"`, or the folder of a
            pipeline.
        gpu: a card such as `"RTX 4090"`, whose published figures give the time; `"here"` times one
            repetition of each step on the device at hand, with random weights. No time when `None`.
        memory_gib: of the device, in place of what is known of it.
        exact: all blocks of a model are traced; otherwise a few, and the rest is linear in their number.
        setting: of the run, by the names of the training scripts; see `setting_names`.

    Raises:
        ValueError: an unknown tool, model, card or setting, or one that the model cannot take.
    """
    names = setting_names(tool)
    unknown = sorted(setting.keys() - set(names))
    if unknown:
        raise ValueError(
            f"`setting` of {tool!r} must be among {names}, got {unknown[0]!r}. Leave it out, or check "
            "its name."
        )
    target = find_target(gpu, memory_gib)
    draft = _DRAFTS[tool][0](read_base_model(model), as_on_gpu=target.as_on_gpu, **setting)
    return finish_plan(draft, target, exact)


def setting_names(tool: str) -> list[str]:
    """What `plan_run` takes as the setting of a tool.

    Raises:
        ValueError: no such tool.
    """
    if tool not in _DRAFTS:
        raise ValueError(f"`tool` must be one of {TOOLS}, got {tool!r}.")
    return [field.name for field in fields(_DRAFTS[tool][1])]

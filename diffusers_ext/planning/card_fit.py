"""How to train an eraser within the memory of a given card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusers_ext.planning.eraser_training import (
    GIB,
    EraserPlan,
    EraserSetting,
    PipelineConfigs,
    plan_eraser_training,
    read_pipeline_configs,
)


_SMALL_RANK, _MOST_ROWS = 32, 8
_FEWER_FRAMES = (81, 49, 33, 17, 9)


@dataclass(frozen=True)
class CardFit:
    """What was found for a card.

    Attributes:
        plan: the best that fits; the smallest that was tried where nothing does.
        available: bytes of the card without the reserve.
    """

    plan: EraserPlan
    available: int

    @property
    def fits(self) -> bool:
        """Whether the plan does."""
        return self.plan.peak <= self.available

    @property
    def missing(self) -> int:
        """Bytes that the card has too few; 0 where the plan fits."""
        return max(0, self.plan.peak - self.available)


def recommend_eraser_training(
    model: str | os.PathLike | PipelineConfigs,
    memory_gib: float,
    setting: EraserSetting | None = None,
    *,
    reserve_gib: float = 1.0,
) -> CardFit:
    """The settings that lose least and fit a card.

    Clips stay as asked for as long as anything fits: first without gradient checkpointing, then with
    it, then with target and preserved rows in turn, then with a small rank; after that clips get
    shorter. Where it fits with room, rows are doubled.

    Args:
        model: see `read_pipeline_configs`, or configs.
        memory_gib: of the card.
        setting: what is wanted; checkpointing and rows are chosen here.
        reserve_gib: left for the GPU's context and for fragmentation.

    Raises:
        ValueError: no memory beyond the reserve, or a setting that the model cannot take.
    """
    available = int((memory_gib - reserve_gib) * GIB)
    if available <= 0:
        raise ValueError(f"`memory_gib` must be above the reserve {reserve_gib}, got {memory_gib}.")
    configs = model if isinstance(model, PipelineConfigs) else read_pipeline_configs(model)
    setting = EraserSetting() if setting is None else setting
    smallest = None
    for frugal in _frugal(configs, setting):
        if frugal.peak <= available:
            return CardFit(_least_frugal(configs, frugal, available), available)
        if smallest is None or frugal.peak < smallest.peak:
            smallest = frugal
    return CardFit(smallest, available)


def _frugal(configs: PipelineConfigs, setting: EraserSetting) -> Iterator[EraserPlan]:
    """Plans with everything that saves memory, from the clips asked for to the shortest."""
    setting = replace(
        setting, target_rows=1, preserved_rows=1, rows_in_turn=True, gradient_checkpointing=True
    )
    plan = plan_eraser_training(configs, setting)
    fewer = [frames for frames in _FEWER_FRAMES if frames < plan.setting.num_frames]
    for frames in (plan.setting.num_frames, *fewer):
        for rank in sorted({setting.rank, min(setting.rank, _SMALL_RANK)}, reverse=True):
            yield plan_eraser_training(configs, replace(plan.setting, num_frames=frames, rank=rank))


def _least_frugal(configs: PipelineConfigs, frugal: EraserPlan, available: int) -> EraserPlan:
    """The first that fits of the plans that save less than one that fits."""
    together = replace(frugal.setting, rows_in_turn=False)
    for checkpointing in (False, True):
        found = None
        setting = replace(together, gradient_checkpointing=checkpointing)
        while setting.target_rows <= _MOST_ROWS:
            plan = plan_eraser_training(configs, setting)
            if plan.peak > available:
                break
            found, rows = plan, 2 * setting.target_rows
            setting = replace(setting, target_rows=rows, preserved_rows=rows)
        if found is not None:
            return found
    return frugal

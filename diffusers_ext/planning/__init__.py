"""What a run takes, before it is run."""

from diffusers_ext.planning.card_fit import CardFit, recommend_eraser_training
from diffusers_ext.planning.eraser_training import (
    EraserPlan,
    EraserSetting,
    PipelineConfigs,
    plan_eraser_training,
    read_pipeline_configs,
)


__all__ = [
    "CardFit",
    "EraserPlan",
    "EraserSetting",
    "PipelineConfigs",
    "plan_eraser_training",
    "read_pipeline_configs",
    "recommend_eraser_training",
]

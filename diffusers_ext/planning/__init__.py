"""What a run takes, before it is run."""

from diffusers_ext.planning.card_fit import CardFit, recommend_eraser_training
from diffusers_ext.planning.eraser_training import (
    EraserPlan,
    EraserSetting,
    PipelineConfigs,
    plan_eraser_training,
    read_pipeline_configs,
)
from diffusers_ext.planning.plans import plan_run, setting_names
from diffusers_ext.planning.run_plan import PhasePlan, RunPlan


__all__ = [
    "CardFit",
    "EraserPlan",
    "EraserSetting",
    "PhasePlan",
    "PipelineConfigs",
    "RunPlan",
    "plan_eraser_training",
    "plan_run",
    "read_pipeline_configs",
    "recommend_eraser_training",
    "setting_names",
]

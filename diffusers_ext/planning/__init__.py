"""What a run takes, before it is run."""

from diffusers_ext.planning.fit import recommend_eraser_training
from diffusers_ext.planning.plans import plan_run, setting_names
from diffusers_ext.planning.run_plan import PhasePlan, RunPlan


__all__ = ["PhasePlan", "RunPlan", "plan_run", "recommend_eraser_training", "setting_names"]

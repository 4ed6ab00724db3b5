"""What a run takes, before it is run."""

from diffusers_ext.core.names import by_name, imported_name

_SOURCES = by_name({
        "diffusers_ext.planning.plan": "PhasePlan RunPlan plan_run setting_names",
        "diffusers_ext.planning.plans": "recommend_eraser_training",
    })  # fmt: skip
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> object:
    return imported_name(__name__, _SOURCES, name)

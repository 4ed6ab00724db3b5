"""What a run takes, before it is run."""

from diffusers_ext.core.settings import by_name, imported_name

_SOURCES = by_name({
        "diffusers_ext.planning.plan": (
            "PhasePlan RunPlan plan_run setting_names recommend_eraser_training"
        ),
    })  # fmt: skip
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> object:
    return imported_name(__name__, _SOURCES, name)

"""Null-space DreamBooth: teach a subject along directions that existing knowledge does not use."""

from typing import Any

from diffusers_ext.core.settings import by_name, imported_name

_SOURCES = by_name(
    {
        "diffusers_ext.families.lora_files": "check_loaded_lora export_lora",
        "diffusers_ext.nullspace.collect": "collect_statistics",
        "diffusers_ext.nullspace.debleed": "debleed_lora preserved_energy",
        "diffusers_ext.nullspace.directions": "NullSpaceDirections null_space_directions",
        "diffusers_ext.nullspace.edit": "edit_concept",
        "diffusers_ext.nullspace.edit_prompts": "ConceptEdit",
        "diffusers_ext.nullspace.interference": "InterferenceReport interference_report",
        "diffusers_ext.nullspace.lora": ("add_null_space_lora predicted_drift preservation_penalty save_lora"),
        "diffusers_ext.nullspace.lora_upload": "push_lora",
        "diffusers_ext.nullspace.pipeline": (
            "NullSpaceDreamBoothAuraFlowPipeline NullSpaceDreamBoothChromaPipeline "
            "NullSpaceDreamBoothFlux2KleinPipeline NullSpaceDreamBoothFluxPipeline NullSpaceDreamBoothPipeline "
            "NullSpaceDreamBoothQwenImagePipeline NullSpaceDreamBoothSD3Pipeline NullSpaceDreamBoothWanPipeline "
            "NullSpaceDreamBoothXLPipeline NullSpaceDreamBoothZImagePipeline"
        ),
        "diffusers_ext.nullspace.projector": "NullSpaceProjector ProjectedUpdate",
        "diffusers_ext.nullspace.statistics": "FeatureStatistics",
        "diffusers_ext.nullspace.text_only": "text_only_linears",
    }
)
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> Any:
    return imported_name(__name__, _SOURCES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})

"""Three tools for Hugging Face diffusers: null-space DreamBooth, golden noise, a concept eraser.

Importing it registers the package with diffusers, so that pipelines with its components load from the Hub, and the
eraser with PEFT; nothing else happens at import: names are imported when they are used.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers_ext.core.settings import by_name, imported_name
from diffusers_ext.documented_names import ALIASES, missing_name

__version__ = "0.1.0"

_SOURCES = by_name(
    {
        "diffusers": "ModelMixin",
        "diffusers_ext.community": "custom_pipeline_path",
        "diffusers_ext.community.modular_steps": "EraserStep NullSpaceLoraStep",
        "diffusers_ext.core.artifacts": "Artifact",
        "diffusers_ext.core.attention_processors": ("CaptureAttnProcessor ProjectAttnProcessor use_processors"),
        "diffusers_ext.core.capture": "capture",
        "diffusers_ext.core.modular": "ExtendedBlocks push_modular_pipeline save_modular_pipeline",
        "diffusers_ext.core.second_moment": "SecondMoment",
        "diffusers_ext.eraser.adapter.config": "EraserConfig eraser_size",
        "diffusers_ext.eraser.adapter.layer": "EraserLayer",
        "diffusers_ext.eraser.adapter.model": "EraserModel",
        "diffusers_ext.eraser.adapter.outputs": "erasers_disabled",
        "diffusers_ext.eraser.concept_masks": "concept_head_weights concept_mask",
        "diffusers_ext.eraser.concepts": "concept_token_mask neighbouring_concepts",
        "diffusers_ext.eraser.files": "load_eraser convert_eraser save_eraser",
        "diffusers_ext.eraser.losses": (
            "ConceptPreservationLoss MaskLocalizationLoss NegativelyGuidedVelocityLoss T2VUnlearningLoss"
        ),
        "diffusers_ext.evaluation.editing": "evaluate_edit EditingReport",
        "diffusers_ext.evaluation.erasure": "evaluate_erasure",
        "diffusers_ext.evaluation.erasure_report": "ErasureReport",
        "diffusers_ext.evaluation.forgetting": "evaluate_forgetting ForgettingReport",
        "diffusers_ext.evaluation.golden_noise": "evaluate_golden_noise RedenoisedTarget",
        "diffusers_ext.evaluation.golden_noise_report": "GoldenNoiseReport",
        "diffusers_ext.evaluation.judges": "CLIPDetector NudeNetDetector",
        "diffusers_ext.evaluation.rendering": "render_clips",
        "diffusers_ext.families.cogvideox": "CogVideoXVelocity",
        "diffusers_ext.golden_noise": (
            "GoldenNoiseFlux2KleinPipeline GoldenNoiseFlux2Pipeline GoldenNoiseFluxPipeline "
            "GoldenNoiseHunyuanDiTPipeline GoldenNoiseModel GoldenNoiseNetwork GoldenNoisePipeline "
            "GoldenNoiseQwenImagePipeline GoldenNoiseSD3Pipeline GoldenNoiseStep GoldenNoiseXLPipeline "
            "GoldenNoiseZImagePipeline NPNet NoiseGuard NoiseSequenceRNN NoiseSequenceTransformer PairDataset "
            "PairWriter TextConditioning encode_prompts first_prediction load_noise_model open_pairs redenoise "
            "redenoise_sequence redenoise_text"
        ),
        "diffusers_ext.nullspace": (
            "ConceptEdit FeatureStatistics InterferenceReport NullSpaceDirections NullSpaceDreamBoothAuraFlowPipeline "
            "NullSpaceDreamBoothChromaPipeline NullSpaceDreamBoothFlux2KleinPipeline NullSpaceDreamBoothFluxPipeline "
            "NullSpaceDreamBoothPipeline NullSpaceDreamBoothQwenImagePipeline NullSpaceDreamBoothSD3Pipeline "
            "NullSpaceDreamBoothWanPipeline NullSpaceDreamBoothXLPipeline NullSpaceDreamBoothZImagePipeline "
            "NullSpaceProjector ProjectedUpdate add_null_space_lora check_loaded_lora collect_statistics debleed_lora "
            "edit_concept export_lora interference_report null_space_directions predicted_drift preservation_penalty "
            "preserved_energy push_lora save_lora text_only_linears"
        ),
        "diffusers_ext.sharing": "push_artifact",
    }
)
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> Any:
    name = ALIASES.get(name, name)
    if name not in _SOURCES:
        raise missing_name(__name__, name)
    return imported_name(__name__, _SOURCES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})


def register() -> None:
    """Make the components of the package known to diffusers, and the eraser to PEFT."""
    from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

    import_module("diffusers_ext.eraser.adapter.model")
    # diffusers finds the components of other libraries by the names of their base classes: by the library
    # when it saves, among those of all libraries when it loads.
    methods = ["save_pretrained", "from_pretrained"]
    loadable = {"ModelMixin": methods, "Artifact": methods}
    LOADABLE_CLASSES.setdefault("diffusers_ext", loadable)
    for name, known in loadable.items():
        ALL_IMPORTABLE_CLASSES.setdefault(name, known)


# The console says what it can do without torch: it registers once it knows what it has to do.
_IS_CONSOLE = Path(sys.argv[0]).stem == "diffusers-ext" or (
    sys.argv[0] == "-m" and "diffusers_ext.command_line" in sys.orig_argv
)
if not _IS_CONSOLE:
    register()

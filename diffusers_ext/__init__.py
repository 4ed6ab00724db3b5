"""Three tools for Hugging Face diffusers: null-space DreamBooth, golden noise, a concept eraser.

Importing it registers the package with diffusers, so that pipelines with its components load from the
Hub, and the eraser with PEFT; nothing else happens at import.
"""

from typing import Any

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from diffusers_ext.community import custom_pipeline_path
from diffusers_ext.core.artifacts import Artifact
from diffusers_ext.core.capture import capture
from diffusers_ext.core.processors import (
    CaptureAttnProcessor,
    ProjectAttnProcessor,
    use_processors,
)
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.documented_names import ALIASES, missing_name
from diffusers_ext.eraser import (
    CogVideoXVelocity,
    ConceptPreservationLoss,
    EraserConfig,
    EraserLayer,
    EraserModel,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
    concept_head_weights,
    concept_mask,
    concept_token_mask,
    convert_eraser,
    eraser_size,
    erasers_disabled,
    load_eraser,
    neighbouring_concepts,
    save_eraser,
)
from diffusers_ext.evaluation.clip_detector import CLIPDetector
from diffusers_ext.evaluation.clip_rendering import render_clips
from diffusers_ext.evaluation.erasure import evaluate_erasure
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import evaluate_forgetting
from diffusers_ext.evaluation.forgetting_report import ForgettingReport
from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.evaluation.golden_noise_subjects import RedenoisedTarget
from diffusers_ext.evaluation.nudenet_detector import NudeNetDetector
from diffusers_ext.golden_noise import (
    GoldenNoiseFluxPipeline,
    GoldenNoiseHunyuanDiTPipeline,
    GoldenNoiseModel,
    GoldenNoisePipeline,
    GoldenNoiseSD3Pipeline,
    GoldenNoiseXLPipeline,
    NoiseSequenceRNN,
    NoiseSequenceTransformer,
    NPNet,
    PairDataset,
    PairWriter,
    TextConditioning,
    encode_prompts,
    load_noise_model,
    open_pairs,
    redenoise,
    redenoise_sequence,
    redenoise_text,
)
from diffusers_ext.nullspace import (
    FeatureStatistics,
    NullSpaceDirections,
    NullSpaceDreamBoothPipeline,
    NullSpaceDreamBoothXLPipeline,
    NullSpaceProjector,
    ProjectedUpdate,
    add_null_space_lora,
    check_loaded_lora,
    collect_statistics,
    debleed_lora,
    export_lora,
    null_space_directions,
    predicted_drift,
    preservation_penalty,
    preserved_energy,
    push_lora,
    save_lora,
)
from diffusers_ext.sharing import push_artifact


__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "CLIPDetector",
    "CaptureAttnProcessor",
    "CogVideoXVelocity",
    "ConceptPreservationLoss",
    "EraserConfig",
    "EraserLayer",
    "EraserModel",
    "ErasureReport",
    "FeatureStatistics",
    "ForgettingReport",
    "GoldenNoiseFluxPipeline",
    "GoldenNoiseHunyuanDiTPipeline",
    "GoldenNoiseModel",
    "GoldenNoisePipeline",
    "GoldenNoiseReport",
    "GoldenNoiseSD3Pipeline",
    "GoldenNoiseXLPipeline",
    "MaskLocalizationLoss",
    "ModelMixin",
    "NPNet",
    "NegativelyGuidedVelocityLoss",
    "NoiseSequenceRNN",
    "NoiseSequenceTransformer",
    "NudeNetDetector",
    "NullSpaceDirections",
    "NullSpaceDreamBoothPipeline",
    "NullSpaceDreamBoothXLPipeline",
    "NullSpaceProjector",
    "PairDataset",
    "PairWriter",
    "ProjectAttnProcessor",
    "ProjectedUpdate",
    "RedenoisedTarget",
    "SecondMoment",
    "T2VUnlearningLoss",
    "TextConditioning",
    "add_null_space_lora",
    "capture",
    "check_loaded_lora",
    "collect_statistics",
    "concept_head_weights",
    "concept_mask",
    "concept_token_mask",
    "convert_eraser",
    "custom_pipeline_path",
    "debleed_lora",
    "encode_prompts",
    "eraser_size",
    "erasers_disabled",
    "evaluate_erasure",
    "evaluate_forgetting",
    "evaluate_golden_noise",
    "export_lora",
    "load_eraser",
    "load_noise_model",
    "neighbouring_concepts",
    "null_space_directions",
    "open_pairs",
    "predicted_drift",
    "preservation_penalty",
    "preserved_energy",
    "push_artifact",
    "push_lora",
    "redenoise",
    "redenoise_sequence",
    "redenoise_text",
    "render_clips",
    "save_eraser",
    "save_lora",
    "use_processors",
]

# diffusers finds the components of other libraries by the names of their base classes: by the library
# when it saves, among those of all libraries when it loads.
_LOADABLE = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "Artifact": ["save_pretrained", "from_pretrained"],
}
LOADABLE_CLASSES.setdefault("diffusers_ext", _LOADABLE)
for _name, _methods in _LOADABLE.items():
    ALL_IMPORTABLE_CLASSES.setdefault(_name, _methods)


def __getattr__(name: str) -> Any:
    if name in ALIASES:
        return globals()[ALIASES[name]]
    raise missing_name(__name__, name)

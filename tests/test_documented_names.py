from __future__ import annotations

import importlib
from operator import attrgetter

import pytest

import diffusers_ext
from diffusers_ext.documented_names import ALIASES, REPLACEMENTS

# Every class and function that the design documents name.
NULL_SPACE = (
    "load_covariance_data", "apply_nullspace_constraint", "validate_covariance_matrix",
    "update_covariance_incrementally", "compress_covariance_matrix", "compute_covariance",
    "distribute_covariance_computation", "compute_partial_covariance", "merge_covariance_results",
    "process_in_batches", "save_immediately_and_clear", "compute_and_save_covariance",
    "robust_save_matrix", "reshape_and_center",
)  # fmt: skip
GOLDEN_NOISE = (
    "NPNet", "NoiseSequenceTransformer", "NoiseSequenceRNN_v2", "SVDNoiseUnet", "NoiseTransformer",
    "CrossAttention", "encode_text",
)  # fmt: skip
ERASER = (
    "AdapterEraser", "CogVideoXWithEraser", "setup_cogvideo_adapter_eraser", "zero_module",
    "MaskLocalizationLoss", "NegativelyGuidedVelocityLoss", "ConceptPreservationLoss",
    "T2VUnlearningLoss", "AttnMapsCapture", "get_mask", "EraserOutputsCapture",
)  # fmt: skip
# What of `diffusers_ext` stands for each of them.
REPLACED_BY = {
    "load_covariance_data": "FeatureStatistics.from_layout FeatureStatistics.from_pretrained",
    "apply_nullspace_constraint": "NullSpaceProjector.from_statistics NullSpaceProjector.project",
    "validate_covariance_matrix": "FeatureStatistics.validate",
    "update_covariance_incrementally": "FeatureStatistics.merge SecondMoment.merge",
    "compress_covariance_matrix": "FeatureStatistics.compress",
    "distribute_covariance_computation": "collect_statistics FeatureStatistics.all_reduce",
    "compute_covariance": "SecondMoment.update SecondMoment.mean",
    "compute_partial_covariance": "collect_statistics",
    "merge_covariance_results": "FeatureStatistics.merge",
    "compute_and_save_covariance": "collect_statistics FeatureStatistics.export_layout",
    "reshape_and_center": "SecondMoment.update",
    "process_in_batches": "collect_statistics",
    "save_immediately_and_clear": "collect_statistics",
    "robust_save_matrix": "FeatureStatistics.save_pretrained FeatureStatistics.export_layout",
    "SVDNoiseUnet": "NPNet",
    "NoiseTransformer": "NPNet",
    "CrossAttention": "NPNet",
    "encode_text": "encode_prompts",
    "AdapterEraser": "EraserConfig EraserLayer",
    "CogVideoXWithEraser": "EraserConfig EraserModel load_eraser",
    "setup_cogvideo_adapter_eraser": "EraserConfig",
    "zero_module": "EraserConfig",
    "AttnMapsCapture": "concept_mask eraser.concept_attention.concept_attention",
    "get_mask": "concept_mask concept_token_mask",
    "EraserOutputsCapture": "eraser.adapter.outputs.eraser_outputs",
}


def test_every_documented_name_works_or_says_what_to_use(subtests):
    for name in NULL_SPACE + GOLDEN_NOISE + ERASER:
        with subtests.test(name=name):
            if name in diffusers_ext.__all__ or name in ALIASES:
                assert callable(getattr(diffusers_ext, name))
                continue
            message = f"'diffusers_ext' has no '{name}' of the design documents. Use `"
            with pytest.raises(ImportError, match=message):
                getattr(diffusers_ext, name)
            with pytest.raises(ImportError, match=message):
                exec(f"from diffusers_ext import {name}", {})


def test_every_replacement_is_there_and_named(subtests):
    assert REPLACED_BY.keys() == REPLACEMENTS.keys()
    for name, replaced_by in REPLACED_BY.items():
        with subtests.test(name=name):
            for dotted in replaced_by.split():
                module, _, attribute = dotted.rpartition(".")
                if module.islower():  # not a class
                    found = importlib.import_module(f"diffusers_ext.{module}")
                    assert callable(getattr(found, attribute))
                else:
                    assert attrgetter(dotted)(diffusers_ext)
            assert any(dotted.split(".")[-1] in REPLACEMENTS[name] for dotted in replaced_by.split())


def test_a_name_with_the_same_meaning_is_the_class_itself():
    assert diffusers_ext.NoiseSequenceRNN_v2 is diffusers_ext.NoiseSequenceRNN


def test_other_names_are_missing_as_usual():
    with pytest.raises(AttributeError, match="module 'diffusers_ext' has no attribute 'weather'"):
        _ = diffusers_ext.weather
    assert not hasattr(diffusers_ext, "weather")
    with pytest.raises(ImportError, match="cannot import name 'weather'"):
        exec("from diffusers_ext import weather", {})

from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusionXLPipeline

from diffusers_ext.golden_noise import pipelines as pipeline
from diffusers_ext.golden_noise import pipelines as pipeline_transformers
from diffusers_ext.golden_noise.card import GOLDEN_PIPELINES, golden_pipeline_name, network_card
from tests.evaluation.golden_subjects import small_network
from tests.golden_noise.shared_facts import NETWORK_FACTS, upload_base


def test_every_plain_pipeline_has_its_golden_one():
    for plain, golden in GOLDEN_PIPELINES.items():
        module = pipeline if hasattr(pipeline, golden) else pipeline_transformers
        assert plain in {parent.__name__ for parent in getattr(module, golden).__mro__}


def test_class_and_licence_are_read_from_the_base_model(hub):
    base = upload_base(class_name="FluxPipeline")
    card = network_card(small_network(), base_model=base, trained_on="8 pairs")("tester/noise")
    assert card.data.license == "openrail++"
    assert "GoldenNoiseFluxPipeline" in card.text


def test_a_folder_as_base_model_is_named_but_not_its_path(tmp_path):
    base = tmp_path / "my-base"
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    facts = {**NETWORK_FACTS, "base_model": base, "pipeline": None}
    card = network_card(small_network(), **facts)("tester/noise")
    assert card.data.base_model is None
    assert "my-base" in card.text
    assert "GoldenNoisePipeline" in card.text
    assert str(tmp_path) not in str(card)


def test_the_trained_shape_goes_before_the_configs():
    network = small_network()
    assert "4 x 8 x 8" in network_card(network, **NETWORK_FACTS)("a/b").text
    card = network_card(network, latent_shape=(4, 8, 16), **NETWORK_FACTS)("a/b")
    assert "4 x 8 x 16" in card.text


def test_classes_and_names_of_both_kinds_are_taken():
    for given in (StableDiffusionXLPipeline, "StableDiffusionXLPipeline", "GoldenNoiseXLPipeline"):
        assert golden_pipeline_name("any/base", given) == "GoldenNoiseXLPipeline"
    with pytest.raises(ValueError, match=r"`pipeline` must be one of .*, got 'CogVideoXPipeline'"):
        golden_pipeline_name("any/base", "CogVideoXPipeline")

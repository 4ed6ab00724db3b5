from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig

from diffusers_ext.golden_noise import pipelines
from diffusers_ext.golden_noise.card import GOLDEN_PIPELINES, golden_pipeline_name, network_card, pipeline_card
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from tests.evaluation.golden_subjects import small_network
from tests.golden_noise.golden_pipelines import FAMILIES, golden_pipeline
from tests.golden_noise.shared_facts import NETWORK_FACTS, upload_base


def test_every_plain_pipeline_has_its_golden_one():
    for plain, golden in GOLDEN_PIPELINES.items():
        assert plain in {parent.__name__ for parent in getattr(pipelines, golden).__mro__}


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


FACTS = {"base_model": "somebody/base", "license": "mit", "trained_on": "900 noise pairs"}


@pytest.fixture(scope="module")
def pipeline():
    return golden_pipeline("sd")


def test_a_plain_model_on_the_hub_is_the_base(hub, pipeline):
    plain = GoldenNoisePipeline.from_pipe(pipeline, noise_model=None)
    plain.register_to_config(_name_or_path=upload_base())
    card = pipeline_card(plain)("tester/golden")
    assert card.data.base_model == "tester/base"
    assert card.data.license == "openrail++"
    assert "these are the weights of tester/base" in card.text
    golden = upload_base("tester/golden", "GoldenNoisePipeline")
    plain.register_to_config(_name_or_path=golden)  # its own base is another one
    with pytest.raises(ValueError, match="`base_model` must be given for the card of a pipeline th"):
        pipeline_card(plain)


def test_missing_facts(hub, pipeline, tmp_path):
    for name, message in (
        ("base_model", "`base_model` must be given for the card of a pipeline that was not loaded"),
        ("trained_on", "`trained_on` must be given for the card"),
        ("license", "`license` must be given, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.push_to_hub("tester/golden", **{**FACTS, name: None})
    assert not hub.repos
    with pytest.raises(ValueError, match="`pipeline` must be one of .*, got a StableDiffusionPipe"):
        pipeline_card(FAMILIES["sd"].plain(), **FACTS)


def test_loaded_loras_are_refused():
    pipeline = golden_pipeline("sd")
    pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    with pytest.raises(ValueError, match=r"must have no LoRA loaded, got one in \['unet'\]"):
        pipeline_card(pipeline, **FACTS)

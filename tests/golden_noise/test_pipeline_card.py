from __future__ import annotations

import pytest
from peft import LoraConfig

from diffusers_ext.golden_noise.card import pipeline_card
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from tests.golden_noise.golden_pipelines import FAMILIES, golden_pipeline
from tests.golden_noise.shared_facts import upload_base


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
    with pytest.raises(
        ValueError, match="`base_model` must be given for the card of a pipeline th"
    ):
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

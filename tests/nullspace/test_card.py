from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline, subject_pipeline_card
from diffusers_ext.nullspace.statistics import collection_settings, statistics_card
from tests.nullspace.test_statistics import made_up
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora

FACTS = {"base_model": "user/base", "pipeline": "StableDiffusionPipeline", "license": "mit"}


def test_a_card_from_the_facts_of_the_statistics():
    statistics = made_up(**{k: FACTS[k] for k in ("base_model", "pipeline")})
    card = statistics_card(statistics, license="mit")("me/known")
    assert card.data.base_model == "user/base"
    assert "What 3 linear layers read for 1 prompt." in card.text
    assert "prompt 0" in card.text
    given = statistics_card(statistics, license="mit", trained_on="Prompts of a zoo.")("me/known")
    assert "Prompts of a zoo." in given.text


@pytest.mark.parametrize("missing", ["base_model", "pipeline"])
def test_what_statistics_do_not_know_must_be_given(missing):
    with pytest.raises(ValueError, match=f"`{missing}` must be given for the card"):
        statistics_card(made_up(), **{**FACTS, missing: None})
    with pytest.raises(ValueError, match="`num_prompts`, `trained_on` must be given"):
        statistics_card(made_up(prompts=[]), **FACTS)
    imported = statistics_card(made_up(prompts=[]), **FACTS, num_prompts=7, example_prompts=["a red one"])
    assert "for 7 prompts" in imported("me/known").text


def test_settings_are_single_values():
    run = {"num_inference_steps": 3, "height": None}
    settings = {"features": ["k", "v"], "layers": [0, 2], "scheduler": {"a": 1}, "run": run}
    shown = collection_settings({"settings": settings, "compressed_energy": 0.9})
    assert shown == {
        "features": "k, v", "layers": "0, 2", "num_inference_steps": 3, "compressed_energy": 0.9,
    }  # fmt: skip


SUBJECT = {
    "instance_prompt": "a photo of sks", "base_model": "user/base", "license": "mit",
    "trained_on": "Five pictures.",
}  # fmt: skip


def test_a_pipeline_and_its_statistics_go_to_the_hub_and_come_back(hub, few_statistics, tmp_path):
    pipeline = NullSpaceDreamBoothPipeline.from_pipe(random_digits_pipeline(), statistics=few_statistics)
    pipeline.save_pretrained(tmp_path / "subject", push_to_hub=True, private=True, **SUBJECT)
    files = hub.files("tester/subject")
    assert {"README.md", "model_index.json", "statistics/config.json"} <= files.keys()
    assert hub.repos["tester/subject"].private
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model_relation == "finetune"
    assert card.data.instance_prompt == "a photo of sks"
    loaded = NullSpaceDreamBoothPipeline.from_pretrained("tester/subject", dtype=torch.float32)
    assert loaded.statistics.facts == few_statistics.facts
    weights = pipeline.unet.state_dict()
    assert all(value.equal(weights[name]) for name, value in loaded.unet.state_dict().items())
    assert "tester/other/commit" in pipeline.push_to_hub("tester/other", variant="fp16", **SUBJECT)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("tester/other")


def test_what_a_pipeline_does_not_know_must_be_given(hub, digits, few_statistics, tmp_path):
    pipeline = NullSpaceDreamBoothPipeline.from_pipe(digits)
    for missing in ("instance_prompt", "base_model", "trained_on"):
        with pytest.raises(ValueError, match=f"`{missing}` must be given for the card, got None"):
            pipeline.save_pretrained(tmp_path / "out", push_to_hub=True, **{**SUBJECT, missing: None})
    assert not (tmp_path / "out").exists()
    add_random_lora(pipeline.unet)
    with pytest.raises(ValueError, match=r"must hold no adapters .*, got \['default'\] in its `unet`"):
        pipeline.push_to_hub("tester/subject", **SUBJECT)
    assert not hub.repos


def test_where_the_base_model_is_read_from(digits, few_statistics, tmp_path):
    facts = {**SUBJECT, "base_model": None}
    digits.register_to_config(_name_or_path="user/named")
    assert subject_pipeline_card(digits, **facts)("me/subject").data.base_model == "user/named"
    digits.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="`base_model` must be given"):
        subject_pipeline_card(digits, **facts)
    pipeline = NullSpaceDreamBoothPipeline.from_pipe(digits, statistics=few_statistics)
    few_statistics.facts["base_model"] = "user/measured"
    try:
        card = subject_pipeline_card(pipeline, **facts)("me/subject")
    finally:
        few_statistics.facts["base_model"] = ""
    assert card.data.base_model == "user/measured"

from __future__ import annotations

import pytest

from diffusers_ext.nullspace.card import collection_settings, statistics_card
from tests.nullspace.test_statistics import made_up


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
    imported = statistics_card(
        made_up(prompts=[]), **FACTS, num_prompts=7, example_prompts=["a red one"]
    )
    assert "for 7 prompts" in imported("me/known").text


def test_settings_are_single_values():
    run = {"num_inference_steps": 3, "height": None}
    settings = {"features": ["k", "v"], "layers": [0, 2], "scheduler": {"a": 1}, "run": run}
    shown = collection_settings({"settings": settings, "compressed_energy": 0.9})
    assert shown == {
        "features": "k, v", "layers": "0, 2", "num_inference_steps": 3, "compressed_energy": 0.9,
    }  # fmt: skip

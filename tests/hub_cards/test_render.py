from __future__ import annotations

import pytest
from huggingface_hub import ModelCardData

from hub_cards import render


def test_a_template_is_filled():
    facts = {"base": "somebody/base", "repo_id": "me/statistics", "num_prompts": 12}
    card = render("feature_statistics", ModelCardData(license="mit", tags=["x"]), **facts)
    assert card.data.license == "mit"
    assert "base_model" not in str(card).split("---")[1]
    assert all(str(value) in card.text for value in facts.values())
    assert "{{" not in card.text


ERASER = {
    "base": "somebody/video",
    "repo_id": "me/no-sevens",
    "pipeline": "CogVideoXPipeline",
    "concept": "seven",
    "anchor_concept": "digit",
    "rank": 32,
    "parameters": "1,234",
    "settings": {"steps": 400, "guidance_scale": 1.0},
    "preserved_concepts": ["eight", "three"],
    "judge": "the digits judge",
    "figures": {"target": ("0.99", "0.00"), "preserved": ("0.97", "0.96")},
}


def test_the_card_of_an_eraser():
    text = render("eraser", ModelCardData(license="other", tags=["eraser"]), **ERASER).text
    for expected in (
        "# seven, erased from somebody/video",
        "rank 32",
        "1,234 parameters",
        'no longer show it, but what the model shows for "digit",\nand other prompts',
        'CogVideoXPipeline.from_pretrained("somebody/video")',
        'load_eraser(pipeline, "me/no-sevens", scale=1.0)',
        "|---|---|\n| steps | 400 |\n| guidance_scale | 1.0 |\n\nKept on purpose: eight, three.\n",
        "as read by the digits judge",
        "|---|---|---|\n| target | 0.99 | 0.00 |\n| preserved | 0.97 | 0.96 |\n\n## Limits",
    ):
        assert expected in text
    assert not {"{{", "{%"} & set(text.split())
    assert "\n\n\n" not in text


def test_the_card_of_an_eraser_that_was_not_judged():
    absent = {"anchor_concept": None, "settings": {}, "preserved_concepts": [], "figures": {}}
    text = render("eraser", ModelCardData(), **ERASER | absent | {"judge": None}).text
    for left_out in ("None", "## Figures", "## Training", "Kept on purpose", "the model shows"):
        assert left_out not in text
    assert "\n\n\n" not in text


def test_an_unknown_template():
    message = r"`template` must be one of \['eraser', .*'subject_lora', .*, got 'x'"
    with pytest.raises(ValueError, match=message):
        render("x", ModelCardData())

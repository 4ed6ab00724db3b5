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


def test_an_unknown_template():
    message = r"`template` must be one of \['feature_statistics', .*'subject_lora', .*, got 'x'"
    with pytest.raises(ValueError, match=message):
        render("x", ModelCardData())

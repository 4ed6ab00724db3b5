from __future__ import annotations

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from diffusers_ext.hub.owner_text import is_automatic


def test_the_card_that_peft_writes(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(network, LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "PEFT" in text
    assert is_automatic(text)
    assert not is_automatic(text.replace("[More Information Needed]", "by me", 1))


def test_the_card_that_diffusers_writes_after_a_training():
    text = (
        "<!-- This model card has been generated automatically according to the information the "
        "training script had access to. You\nshould probably proofread and complete it, then remove "
        "this comment. -->\n\n\n## Intended uses & limitations\n\n#### How to use\n\n```python\n"
        "# TODO: add an example code snippet for running this diffusion pipeline\n```\n"
    )
    assert is_automatic(text)
    assert not is_automatic(text.replace("# TODO: add an", "pipeline = my"))


def test_words_of_people_are_not_automatic():
    assert is_automatic("\n \n")
    for words in ("My model.", "## Limits", "- PEFT is needed", "[TODO: x] and more"):
        assert not is_automatic(words)

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard

from diffusers_ext.hub.card import make_card
from diffusers_ext.hub.push import PushWithCard
from tests.tiny_models import sd_unet


FACTS = {
    "base_model": "user/base", "license": "mit", "trained_on": None, "concept": "seven",
    "anchor_concept": "", "preserved_concepts": [], "pipeline": "CogVideoXPipeline", "rank": 1,
    "parameters": 2,
}  # fmt: skip


class Described(PushWithCard, UNet2DConditionModel):
    """A model of diffusers with a card."""

    def _card(self, *, token, **facts):
        return make_card("eraser", token=token, **{**FACTS, **facts})


class Undescribed(PushWithCard, UNet2DConditionModel):
    """A model without a card."""


@pytest.fixture(scope="module")
def model() -> Described:
    return Described.from_config(sd_unet().model.config)


def test_both_ways_of_an_upload(hub, model, tmp_path):
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "diary.txt").write_text("mine")
    model.save_pretrained(
        tmp_path / "named", variant="fp16", push_to_hub=True, is_main_process=True, trained_on="Words.",
        private=True,
    )  # fmt: skip
    names = ["README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert sorted(hub.files("tester/named")) == names
    assert "tester/named" in ModelCard(hub.files("tester/named")["README.md"].decode()).text
    assert hub.repos["tester/named"].private
    address = model.push_to_hub("tester/other", max_shard_size="20KB", trained_on="Words.")
    assert "tester/other/commit/" in address
    assert "diffusion_pytorch_model.safetensors.index.json" in hub.files("tester/other")
    loaded = UNet2DConditionModel.from_pretrained("tester/named", variant="fp16")
    weights = model.state_dict()
    assert all(value.equal(weights[name]) for name, value in loaded.state_dict().items())


def test_nothing_is_written_without_a_card(hub, model, tmp_path):
    with pytest.raises(ValueError, match="`trained_on` must be given"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(TypeError, match="Undescribed must define `_card`"):
        Undescribed.from_config(sd_unet().model.config).push_to_hub("tester/out")
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_saving_is_that_of_diffusers(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "diffusion_pytorch_model.safetensors.index.json" in names

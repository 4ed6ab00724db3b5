from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.families.lora_files import KOHYA_NAME, check_loaded_lora
from diffusers_ext.nullspace.lora_upload import push_lora
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.nullspace.test_pipeline import lora

FACTS = {
    "instance_prompt": "a photo of sks", "pipeline": "StableDiffusionPipeline",
    "directions": "generalized", "trained_on": "Five pictures.", "base_model": "user/base",
    "license": "mit",
}  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.safetensors"
    save_file(lora(), path)
    return path


def test_a_lora_loads_by_its_name(hub, file, digits, few_statistics, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    address = push_lora(
        file, "mine", **FACTS, statistics=few_statistics,
        widget=[("a red sks", tmp_path / "one.png")], revision="next",
    )  # fmt: skip
    assert "tester/mine/commit/" in address
    files = hub.files("tester/mine", revision="next")
    assert sorted(files) == [
        "README.md", KOHYA_NAME, "pictures/0.png", LORA_WEIGHT_NAME,
        "statistics/config.json",
        "statistics/model.safetensors",
    ]  # fmt: skip
    assert files[LORA_WEIGHT_NAME] == file.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.widget == [{"text": "a red sks", "output": {"url": "pictures/0.png"}}]
    assert "null-space-lora" in card.data.tags
    digits.load_lora_weights("tester/mine", revision="next")
    assert check_loaded_lora(digits) == 1
    found = FeatureStatistics.from_pretrained("tester/mine", subfolder="statistics", revision="next")
    assert found.facts == few_statistics.facts


def test_a_lora_in_a_folder_of_the_repository(hub, file, tmp_path):
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / LORA_WEIGHT_NAME)
    (tmp_path / "one.gif").write_bytes(b"picture")
    push_lora(
        tmp_path / "folder", "many", **{**FACTS, "directions": "plain"}, subfolder="styles/one",
        widget=[("a red sks", tmp_path / "one.gif")],
    )  # fmt: skip
    files = hub.files("tester/many")
    names = ["README.md", f"styles/one/{KOHYA_NAME}", "styles/one/pictures/0.gif", f"styles/one/{LORA_WEIGHT_NAME}"]
    assert sorted(files) == names
    card = ModelCard(files["README.md"].decode())
    assert card.data.widget[0]["output"]["url"] == names[2]
    assert f"`styles/one/{KOHYA_NAME}` and put it" in card.text
    assert "null-space-lora" not in card.data.tags


def test_a_lora_of_a_transformer_goes_without_a_second_file(hub, tmp_path):
    layer, file = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "flux.safetensors"
    save_file({f"{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, file)
    push_lora(file, "mine", **{**FACTS, "pipeline": "FluxPipeline"})
    assert sorted(hub.files("tester/mine")) == ["README.md", LORA_WEIGHT_NAME]
    assert "ComfyUI" not in hub.files("tester/mine")["README.md"].decode()


def test_nothing_wrong_is_uploaded(hub, file, tmp_path):
    def push(source=file, **changes) -> None:
        push_lora(source, "mine", **{**FACTS, **changes})

    with pytest.raises(ValueError, match="`source` must be a .safetensors file"):
        push(tmp_path / "absent.safetensors")
    save_file(lora(scale=0.0), tmp_path / "zero.safetensors")
    with pytest.raises(ValueError, match="A LoRA must have an effect"):
        push(tmp_path / "zero.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="Every key of a LoRA must end in"):
        push(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="`directions` must be one of"):
        push(directions="sideways")
    with pytest.raises(ValueError, match="`base_model` must be given"):
        push(base_model=None)
    with pytest.raises(ValueError, match="`widget` must name picture files, got .*absent.png"):
        push(widget=[("a prompt", tmp_path / "absent.png")])
    assert not hub.repos

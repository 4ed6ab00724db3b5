from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers_ext.core.sources import (
    DOWNLOAD_ARGUMENTS,
    check_download_arguments,
    hub_names,
    lora_file,
)
from diffusers_ext.evaluation.features import CLIPFeatures
from diffusers_ext.rewards.clip import CLIPScoreReward, PickScoreReward
from diffusers_ext.rewards.hpsv2 import HPSv2Reward


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


def test_files_and_folders(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    assert lora_file(str(file)) == lora_file(str(folder)) == file
    assert lora_file(str(folder), "pytorch_lora_weights.safetensors") == file


def test_what_is_not_there(folder, hub):
    with pytest.raises(ValueError, match="must hold x.safetensors, got none. Name it with"):
        lora_file(str(folder), "x.safetensors")
    for source in ("./nowhere", "nowhere", "some/file.safetensors", "a/b/c", "a b/c", "../a"):
        with pytest.raises(
            ValueError, match=f"a folder or 'user/name', got {source}: no such file"
        ):
            lora_file(source)
    assert not hub.requests
    with pytest.raises(OSError, match="tester/nowhere"):
        lora_file("tester/nowhere")


def test_other_troubles_stay_what_they_are():
    with pytest.raises(LocalEntryNotFoundError), hub_names("path", "a/b", "pairs"):
        raise LocalEntryNotFoundError("The connection was lost.")
    with pytest.raises(RuntimeError), hub_names("path", "a/b", "pairs"):
        raise RuntimeError


def test_keywords_of_a_download_pass():
    check_download_arguments(dict.fromkeys(DOWNLOAD_ARGUMENTS), "load")


def test_others_are_named_with_what_was_meant():
    with pytest.raises(
        TypeError, match=r"load\(\) got an unexpected keyword argument 'revison'"
    ) as e:
        check_download_arguments({"token": None, "revison": "main"}, "load")
    assert "Did you mean 'revision'?" in str(e.value)
    with pytest.raises(TypeError, match="'typo': of a download it takes revision") as e:
        check_download_arguments({"typo": 1}, "load")
    assert "Did you mean" not in str(e.value)


@pytest.mark.parametrize("loader", [CLIPFeatures, CLIPScoreReward, PickScoreReward, HPSv2Reward])
def test_loaders_of_judges_refuse_them_for_a_folder(tmp_path, loader):
    with pytest.raises(TypeError, match=rf"{loader.__name__}.from_pretrained\(\) got .* 'typo'"):
        loader.from_pretrained(tmp_path, typo=1)

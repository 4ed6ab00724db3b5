from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers_ext.core.sources import (
    DOWNLOAD_ARGUMENTS,
    check_download_arguments,
    hub_names,
    lora_file,
    refuse_checkpoint,
)
from diffusers_ext.eraser.formats import read_eraser
from diffusers_ext.evaluation.features import CLIPFeatures
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.nullspace.lora_files import read_lora
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.rewards.clip import CLIPScoreReward, PickScoreReward
from diffusers_ext.rewards.hpsv2 import HPSv2Reward
from diffusers_ext.sharing import push_artifact


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    return tmp_path


def test_files_and_folders(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    assert lora_file(str(file)) == lora_file(str(folder)) == file
    assert lora_file(str(folder), "pytorch_lora_weights.safetensors") == file


def test_what_is_not_there(folder, hub, tmp_path_factory, monkeypatch):
    inner = tmp_path_factory.mktemp("empty") / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)  # neither here nor above lies what is named below
    with pytest.raises(ValueError, match="must hold x.safetensors, got none. Name it with"):
        lora_file(str(folder), "x.safetensors")
    for source in ("./nowhere", "nowhere", "some/file.safetensors", "a/b/c", "a b/c", "../a"):
        with pytest.raises(ValueError, match=f"a folder or 'user/name', got {source}: no such file"):
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
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'revison'") as e:
        check_download_arguments({"token": None, "revison": "main"}, "load")
    assert "Did you mean 'revision'?" in str(e.value)
    with pytest.raises(TypeError, match="'typo': of a download it takes revision") as e:
        check_download_arguments({"typo": 1}, "load")
    assert "Did you mean" not in str(e.value)


@pytest.mark.parametrize("loader", [CLIPFeatures, CLIPScoreReward, PickScoreReward, HPSv2Reward])
def test_loaders_of_judges_refuse_them_for_a_folder(tmp_path, loader):
    with pytest.raises(TypeError, match=rf"{loader.__name__}.from_pretrained\(\) got .* 'typo'"):
        loader.from_pretrained(tmp_path, typo=1)


LOADERS = {
    "read_lora": read_lora,
    "read_eraser": read_eraser,
    "load_noise_model": load_noise_model,
    "statistics": FeatureStatistics.from_pretrained,
    "push_artifact": lambda source: push_artifact(source, "user/name"),
    "console": lambda source: lora_file(str(source)),
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """As a training leaves it."""
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir(parents=True)
    for name in ("run.json", "trained_0.safetensors", "random_states_0.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("loader", sorted(LOADERS))
def test_loaders_say_what_a_checkpoint_is(checkpoint, loader):
    with pytest.raises(ValueError, match="got a checkpoint of a training.* Use .*/out, where"):
        LOADERS[loader](checkpoint)


@pytest.mark.parametrize("loader", sorted(LOADERS))
def test_loaders_say_that_a_training_has_not_finished(checkpoint, loader):
    with pytest.raises(ValueError, match="got a training that has not finished: 1 checkpoints"):
        LOADERS[loader](checkpoint.parent)


def test_a_copy_and_a_file_of_one_are_recognised(checkpoint, tmp_path):
    copy = checkpoint.rename(tmp_path / "my_lora")
    for source in (copy, str(copy / "trained_0.safetensors")):
        with pytest.raises(ValueError, match="--resume_from_checkpoint my_lora"):
            refuse_checkpoint(source)


def test_results_and_names_on_the_hub_pass(checkpoint, tmp_path):
    (checkpoint.parent / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "checkpoint-5").mkdir()
    for source in (checkpoint.parent, tmp_path / "checkpoint-5", "user/checkpoint-4", "nowhere"):
        refuse_checkpoint(source)

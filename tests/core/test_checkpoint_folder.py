from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_ext.core.sources import lora_file, refuse_checkpoint
from diffusers_ext.eraser.files.formats import read_eraser
from diffusers_ext.golden_noise.networks.loading import load_noise_model
from diffusers_ext.nullspace.lora_files import read_lora
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.sharing import push_artifact


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

from __future__ import annotations

import socket
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
from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.rewards.clip import CLIPScoreReward, PickScoreReward
from diffusers_ext.rewards.hpsv2 import HPSv2Reward
from diffusers_ext.sharing import push_artifact
from tests.fresh_process import run_python


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


CODE = """
import contextlib, io, time
from diffusers_ext import FeatureStatistics, load_noise_model
from diffusers_ext.command_line.main import main
from diffusers_ext.hub.connection import one_try_to_connect
from diffusers_ext.eraser.formats import read_eraser
from diffusers_ext.training.run.base_model import read_components
from types import SimpleNamespace
prompts, out = arguments[0], arguments[1] + ".safetensors"
model = ["--pretrained_model_name_or_path", "u/n"]
script = SimpleNamespace(pretrained_model_name_or_path="u/n", revision=None)
calls = [
    lambda: main(["collect", *model, "--knowledge_prompts", prompts, "--output_dir", out, "--quiet"]),
    lambda: main(["debleed", "u/n", "--statistics", "u/n", "--output_path", out, "--quiet"]),
    lambda: read_components(script),
    lambda: FeatureStatistics.from_pretrained("u/n"),
    lambda: read_eraser("u/n"),
    lambda: load_noise_model("u/n"),
]
found = []
for call in calls:
    said, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        with one_try_to_connect():
            try:
                call()
            except (ValueError, OSError, TypeError) as error:
                said.write(str(error))
    found.append([time.monotonic() - start, said.getvalue().strip().splitlines()[-1]])
print(json.dumps(found))
"""


def test_without_a_network_all_end_in_one_line_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "p.txt").write_text("a red fox\n")
        found = run_python(
            CODE, tmp_path / "hf", tmp_path / "p.txt", tmp_path / "out", loopback=True,
            variables={"HF_ENDPOINT": endpoint},
        )  # fmt: skip
    for seconds, line in found:
        assert seconds < 5
        assert "got u/n: no such folder, and the Hub cannot be asked" in line
        assert "Check the connection" in line

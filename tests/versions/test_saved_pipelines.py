"""Folders of pipelines that the installed transformers, and the other major version, read as what was saved."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file

from diffusers_ext.families.base_source import load_base
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from diffusers_ext.hub import saved_pipelines
from diffusers_ext.hub.saved_pipelines import check_readable, with_known_dtype, write_for_transformers_4
from tests.tiny_digits import random_digits_pipeline


@pytest.fixture
def folder(tmp_path):
    """As transformers 5 saves a text encoder that was made there."""
    random_digits_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): value.clone() for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return tmp_path


def test_old_names_are_written_and_loaded(folder):
    before = load_file(folder / "text_encoder" / "model.safetensors")
    write_for_transformers_4(folder)
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert names == {f"text_model.{name}" for name in before}
    write_for_transformers_4(folder)  # once more changes nothing
    assert load_file(folder / "text_encoder" / "model.safetensors").keys() == names
    pipeline = load_base(folder, dtype=torch.float32)
    expected = random_digits_pipeline().text_encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.text_encoder.state_dict().items())
    assert pipeline.tokenizer("a red seven").input_ids == random_digits_pipeline().tokenizer("a red seven").input_ids


def test_pipelines_of_this_package_are_saved_that_way(tmp_path):
    pipeline = GoldenNoisePipeline.from_pipe(random_digits_pipeline(), dtype=torch.bfloat16)
    assert pipeline.unet.dtype == torch.bfloat16
    pipeline.save_pretrained(tmp_path)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "text_encoder/model.safetensors"))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "GoldenNoisePipeline"


@pytest.fixture
def under_4(monkeypatch):
    monkeypatch.setattr(saved_pipelines.transformers, "__version__", "4.57.6")


REFUSED = "a model that transformers 4.57.6 reads, got .*, whose text_encoder.* transformers 5 has saved"


def test_random_weights_are_refused_by_transformers_4(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saved_pipelines.transformers, "__version__", "4.57.6")
        with pytest.raises(ValueError, match=REFUSED):
            check_readable(folder, "model")
        with pytest.raises(ValueError, match=REFUSED):
            GoldenNoisePipeline.from_pretrained(folder)
        assert check_readable(folder, "model", given={"text_encoder", "tokenizer"})  # the user's own
    monkeypatch.setattr(saved_pipelines.transformers, "__version__", "5.23.0")
    check_readable(folder, "model")


def add_variant(folder):
    """Beside weights as 5 writes them a variant as 4 does."""
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    named = {f"text_model.{name}": value.half() for name, value in tensors.items()}
    save_file(named, folder / "text_encoder" / "model.fp16.safetensors", {"format": "pt"})


def test_only_what_would_be_loaded_is_judged(folder, under_4):
    add_variant(folder)
    assert check_readable(folder, "model", variant="fp16", given={"tokenizer"})
    for variant in (None, "bf16"):  # that is not there
        with pytest.raises(ValueError, match=REFUSED):
            check_readable(folder, "model", variant=variant)


@pytest.fixture
def pushed(folder, hub):
    """The folder on the Hub, and an older revision whose text encoder is named as 4 does."""
    for revision in ("old", "main"):
        HfApi().create_repo("user/base", exist_ok=True)
        if revision == "main":
            HfApi().create_branch("user/base", branch="old")
        before = load_file(folder / "text_encoder" / "model.safetensors")
        if revision == "old":
            write_for_transformers_4(folder)
        HfApi().upload_folder(repo_id="user/base", folder_path=folder)
        if revision == "old":
            save_file(before, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return "user/base"


def whole_files(hub):
    """Weights that were asked for, but for their headers."""
    return [r.path for r in hub.sent("GET", r"resolve/.*\.safetensors") if r.status == 200]


def test_a_repository_is_refused_before_its_weights_are_fetched(pushed, hub, under_4):
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path` must be {REFUSED}"):
        load_base(pushed, dtype=torch.float32)
    assert whole_files(hub) == []
    assert check_readable(pushed, "model", revision="old")


def test_what_is_in_the_cache_is_not_asked_for_again(pushed, hub, under_4):
    snapshot_download(pushed)
    hub.requests.clear()
    with pytest.raises(ValueError, match=REFUSED):
        check_readable(pushed, "model")
    assert hub.sent("GET", r"\.safetensors") == []


def test_where_headers_cannot_be_read_the_loaded_files_tell(pushed, hub, under_4, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no ranges here")

    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", refuse)
    assert not check_readable(pushed, "model")
    with pytest.raises(ValueError, match=REFUSED.replace(".*", pushed, 1)):
        load_base(pushed, dtype=torch.float32)
    loaded = whole_files(hub)
    assert len(loaded) == len(set(loaded)) == 3  # UNet, VAE and text encoder, each once


@pytest.mark.parametrize("source", ["user/nothing", "./nowhere"])
def test_what_is_not_there_is_left_to_the_loader(source, hub, under_4):
    assert not check_readable(source, "model")


def test_the_dtype_is_the_one_asked_for(folder):
    write_for_transformers_4(folder)
    pipeline = load_base(folder, dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert with_known_dtype({"revision": None}) == {"revision": None}

"""Folders of pipelines that the installed transformers, and the other major version, read as what was saved."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusers_ext.families.base_source import load_base
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
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
    GoldenNoisePipeline.from_pipe(random_digits_pipeline()).save_pretrained(tmp_path)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "text_encoder/model.safetensors"))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "GoldenNoisePipeline"


def test_random_weights_are_refused_by_transformers_4(folder, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match="a model that transformers 4.57.6 reads, got .* text_encoder"):
        check_readable(folder, "model")
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    check_readable(folder, "model")


def test_the_dtype_is_the_one_asked_for(folder):
    write_for_transformers_4(folder)
    pipeline = load_base(folder, dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert with_known_dtype({"revision": None}) == {"revision": None}

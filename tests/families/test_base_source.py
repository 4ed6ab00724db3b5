"""Base models from one file are the folder's to the bit; what is no base model is refused by name."""

from __future__ import annotations

import argparse
import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ext.command_line import options
from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.families.base_source import load_base, read_base_config, refuse_single_file
from diffusers_ext.hub.saved_pipelines import with_known_dtype
from diffusers_ext.planning.models import read_base_model
from diffusers_ext.training.golden_noise.rendering import load_base_pipeline
from diffusers_ext.training.nullspace.knowledge import load_pipeline
from diffusers_ext.training.run.base_model import load_text_pipeline, stored_fingerprint
from tests.hub_errors import close_sessions
from tests.single_file_checkpoints import save_single_file
from tests.tiny_digits import random_digits_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipeline = random_digits_pipeline()
    pipeline.save_pretrained(folder / "model")
    save_single_file(pipeline, folder / "whole.safetensors")
    return folder


def arguments(models, **changes):
    given = {"pretrained_model_name_or_path": str(models / "whole.safetensors"), "revision": None}
    given |= {"variant": None, "mixed_precision": "no", "device": "cpu"}
    return SimpleNamespace(**{**given, "single_file_config": str(models / "model"), "quantization": None, **changes})


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a red 3", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    return made.images


LOADERS = [
    options.load_base_pipeline,
    lambda args: load_base_pipeline(args, CPU, torch.float32),
    lambda args: load_pipeline(args, CPU, torch.float32),
]


@pytest.mark.parametrize("load", LOADERS, ids=["commands", "golden noise", "null space"])
def test_a_single_file_is_the_pipeline_of_its_folder_to_the_bit(models, load):
    one = load(arguments(models))
    folder = load(arguments(models, pretrained_model_name_or_path=str(models / "model"), single_file_config=None))
    assert type(one) is type(folder)
    for name in ("unet", "vae", "text_encoder"):
        found, expected = getattr(one, name).state_dict(), getattr(folder, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not getattr(one, name).training
        assert not any(p.requires_grad for p in getattr(one, name).parameters())
    assert type(one.scheduler) is type(folder.scheduler)
    assert torch.equal(picture(one), picture(folder))


def test_half_precision_is_that_of_the_folder(models):
    given = {"dtype": torch.float16}
    one = load_base(models / "whole.safetensors", single_file_config=str(models / "model"), **given)
    folder = load_base(models / "model", **given)
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(folder, name).state_dict()
        for key, tensor in getattr(one, name).state_dict().items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key])


def test_the_text_encoders_alone_of_a_single_file(models):
    pipeline = load_text_pipeline(arguments(models), CPU)
    expected = StableDiffusionPipeline.from_pretrained(models / "model")
    assert pipeline.vae is None
    assert pipeline.unet.config.cross_attention_dim == 128
    assert fingerprint(pipeline.text_encoder) == fingerprint(expected.text_encoder)
    assert stored_fingerprint(arguments(models)) == fingerprint(expected.unet)


LEFT_OUT = {
    "LoRA": ({"lora_unet_down_blocks_0.lora_down.weight"}, "a LoRA. Name the base model"),
    "UNet": ({"model.diffusion_model.out.2.bias"}, "its denoiser without the VAE and text enc"),
    "component": ({"down_blocks.0.resnets.0.conv1.weight"}, "one component. Give the folder"),
    "embedding": ({"emb_params"}, "a textual inversion. Name the base model"),
    "other": ({"double_blocks.0.weight"}, "tensors such as 'double_blocks.0.weight'"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_other_files_are_refused_by_what_they_are(tmp_path, kind):
    names, message = LEFT_OUT[kind]
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(ValueError, match=rf"`pretrained_model.*must be a whole .*{message}"):
        read_base_config(path)


def test_missing_broken_and_pickled_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"got .*x\.safetensors: no such file"):
        read_base_config(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"x\.safetensors must be"):
        read_base_config(path)
    pickle = tmp_path / "x.ckpt"
    torch.save({}, pickle)
    with pytest.raises(ValueError, match=r"x\.ckpt: a pickle, .* Convert it where you trust it"):
        read_base_config(pickle)


def test_a_file_that_draws_from_more_than_text_is_refused(models, tmp_path):
    tensors = load_file(models / "whole.safetensors")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(56, 9, 3, 3)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="draws from text alone.*'inpainting'"):
        read_base_config(tmp_path / "x.safetensors")


def test_configs_that_do_not_fit_are_refused(models, tmp_path):
    whole, other = models / "whole.safetensors", tmp_path / "other"
    shutil.copytree(models / "model", other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="`single_file_config` must be a StableDiffusionPipeline"):
        read_base_config(whole, single_file_config=str(other))
    (other / "model_index.json").write_text(json.dumps(index))
    unet = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(unet | {"cross_attention_dim": 64}))
    with pytest.raises(ValueError, match="`single_file_config` must be a model whose configs fit"):
        load_base(whole, dtype=torch.float32, single_file_config=str(other))
    with pytest.raises(ValueError, match="`single_file_config` must be given with a single file"):
        read_base_config(models / "model", single_file_config=str(other))
    with pytest.raises(ValueError, match="`variant` must be left out"):
        load_base(whole, dtype=torch.float32, variant="fp16", single_file_config=str(other))


LACKING = {
    "model.diffusion_model.out.2.bias": "configs fit .*the file lacks weights that",
    "first_stage_model.decoder.conv_in.weight": "configs fit .*the file lacks weights that",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": "without 1 of the text_encoder",
}


@pytest.mark.parametrize("key", LACKING)
def test_weights_that_a_file_lacks_are_told(models, tmp_path, key):
    tensors = load_file(models / "whole.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "x.safetensors")
    config = str(models / "model")
    with pytest.raises(ValueError, match=LACKING[key]):
        load_base(tmp_path / "x.safetensors", dtype=torch.float32, single_file_config=config)


def test_without_a_config_the_error_names_the_flag(models, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    close_sessions()
    expected = "`single_file_config` must be .* got stable-diffusion-v1-5/stable-diffusion-v1-5: no such"
    with pytest.raises(ValueError, match=expected):
        read_base_config(models / "whole.safetensors")
    monkeypatch.undo()
    close_sessions()


def test_sdxl_goes_to_its_own_class(tmp_path, monkeypatch):
    """Routing only: whether diffusers converts SDXL's two text encoders is for diffusers to test."""
    names = ("model.diffusion_model.out", "first_stage_model.a", "conditioner.embedders.0.b")
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    config = tmp_path / "config"
    config.mkdir()
    (config / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    called = []

    def from_single_file(*args, **kwargs):
        called.append((args, kwargs))
        return SimpleNamespace(components={})

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_single_file", from_single_file)
    load_base(path, dtype=torch.float16, single_file_config=str(config), vae=None)
    given = with_known_dtype({"config": str(config), "dtype": torch.float16, "vae": None})
    assert called == [((str(path),), given)]


def test_video_models_and_plans_take_no_single_file():
    with pytest.raises(ValueError, match="must be a folder or Hub name of a CogVideoXPipeline"):
        refuse_single_file("x.safetensors", "a CogVideoXPipeline")
    args = argparse.Namespace(pretrained_model_name_or_path="x.safetensors")
    with pytest.raises(ValueError, match="which is not read here"):
        options.check_pipeline_class(args, "eraser")
    with pytest.raises(ValueError, match="a single file, which has no configs to plan by"):
        read_base_model("x.safetensors")

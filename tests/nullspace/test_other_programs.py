"""ComfyUI and A1111 use every key of the file that is written for them, and none of the other."""

from __future__ import annotations

import hashlib
import json
import logging

import diffusers
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_ext import NullSpaceDreamBoothPipeline
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.core.tensor_files import read_tensors
from diffusers_ext.families.lora_files import (
    KOHYA_NAME,
    add_kohya_file,
    check_loaded_lora,
    export_lora,
    training_metadata,
)
from tests.nullspace.other_programs import a1111_knows, comfyui_knows, comfyui_names, text_linears, unet_linears
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora


def lora_of(model: str, width: int = 4, text: bool = True) -> dict[str, torch.Tensor]:
    modules = [f"unet.{name}" for name in unet_linears(model)]
    modules += [f"{component}.{name}" for component, name in text_linears(model)] if text else []
    a, b = torch.ones(1, width), torch.ones(4, 1)
    return {f"{m}.lora_{part}.weight": t for m in modules for part, t in (("A", a), ("B", b))}


@pytest.mark.parametrize(("model", "count"), [("sd", 264), ("sdxl", 986)])
def test_every_key_of_the_second_file_is_known_and_no_attention_of_the_first(model, count):
    lora = lora_of(model)
    assert len(lora) // 2 == count
    names = comfyui_names(unet_linears(model), text_linears(model))
    kohya = export_lora(lora, "kohya")
    assert len(kohya) == 3 * count
    for key in kohya:
        assert comfyui_knows(key, names), key
        assert a1111_knows(key, model), key
    plain = export_lora(lora)  # the names of `pytorch_lora_weights.safetensors`
    assert not [key for key in plain if a1111_knows(key, model)]
    assert not [key for key in plain if ".to_" in key and comfyui_knows(key, names)]


def test_no_key_of_a_trained_file_of_diffusers_is_known():
    attention = [name for name in unet_linears("sd") if name.endswith(("attn2.to_k", "attn2.to_v"))]
    names = comfyui_names(unet_linears("sd"), text_linears("sd"))
    keys = [f"unet.{name}.lora_{part}.weight" for name in attention for part in "AB"]
    assert len(keys) == 64
    assert not [key for key in keys if comfyui_knows(key, names) or a1111_knows(key, "sd")]


def saved(folder, pipeline_class=diffusers.StableDiffusionPipeline):
    pipeline = random_digits_pipeline()
    add_random_lora(pipeline.unet, ("attn2.to_k", "attn2.to_v"))
    layers = get_peft_model_state_dict(pipeline.unet)
    metadata = pipeline.unet.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder


def metadata_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as handle:
        return handle.metadata()


def draw(pipeline) -> torch.Tensor:
    run = {"num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a red seven", generator=torch.Generator().manual_seed(0), **run).images


def test_stock_diffusers_loads_the_folder_as_before_without_a_word_about_two_files(tmp_path, caplog):
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert add_kohya_file(two) == two / KOHYA_NAME
    pictures = []
    diffusers.utils.logging.enable_propagation()
    try:
        for source in (one, two, two / KOHYA_NAME):
            stock = random_digits_pipeline()
            with caplog.at_level(logging.WARNING):
                stock.load_lora_weights(source)
            assert check_loaded_lora(stock) == 14
            pictures.append(draw(stock))
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "more than one weights file" not in caplog.text
    assert pictures[1].equal(pictures[0])
    assert pictures[2].equal(pictures[0])


def test_our_own_pipeline_writes_the_second_file_too(tmp_path):
    saved(tmp_path / "dog", NullSpaceDreamBoothPipeline)
    names = sorted(path.name for path in (tmp_path / "dog").iterdir())
    assert names == [KOHYA_NAME, LORA_WEIGHT_NAME]


def test_metadata_is_what_managers_read(tmp_path):
    folder = saved(tmp_path / "dog")
    told = training_metadata(
        instance_prompt="a photo of sks dog", base_model="user/base",
        prediction_type="epsilon", resolution=512, num_pictures=5,
    )  # fmt: skip
    file = add_kohya_file(folder, told)
    found = metadata_of(file)
    content = file.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    digest = hashlib.sha256(data).hexdigest()  # as A1111 and kohya's scripts compute it
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.hash_sha256"] == f"0x{digest}"
    assert json.loads(found["ss_tag_frequency"]) == {"instance": {"a photo of sks dog": 5}}
    expected = {
        "format": "pt", "modelspec.title": "a photo of sks dog", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.trigger_phrase": "a photo of sks dog", "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon", "ss_sd_model_name": "user/base",
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2.0",
        "ss_num_train_images": "5",
    }  # fmt: skip
    assert expected.items() <= found.items()
    # A model of another width than the published ones is called none of them.
    assert not {"ss_base_model_version", "modelspec.architecture"} & found.keys()
    assert str(tmp_path) not in str(found)
    assert told.items() <= metadata_of(folder / "pytorch_lora_weights.safetensors").items()


@pytest.mark.parametrize(
    ("model", "width", "prediction", "version", "architecture"),
    [
        ("sd", 768, None, "sd_v1", "stable-diffusion-v1/lora"),
        ("sd", 1024, None, "sd_v2", None),
        ("sd", 1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sd", 1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sdxl", 2048, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_family_is_told_by_the_width_of_its_text(tmp_path, model, width, prediction, version, architecture):
    told = training_metadata(prediction_type=prediction)
    export_lora(lora_of(model, width, text=False), "kohya", tmp_path / "l.safetensors", metadata=told)
    found = metadata_of(tmp_path / "l.safetensors")
    assert found["ss_base_model_version"] == version
    assert found["ss_v2"] == str(version.startswith("sd_v2"))
    assert found.get("modelspec.architecture") == architecture


def test_converting_keeps_metadata_there_and_back(tmp_path):
    told = {"modelspec.author": "somebody", "modelspec.trigger_phrase": "sks", "ss_epoch": "3"}
    first, second, third = (tmp_path / f"{n}.safetensors" for n in ("first", "second", "third"))
    export_lora(lora_of("sd", 768), "kohya", first, metadata=told)
    export_lora(first, "diffusers", second)
    export_lora(second, "kohya", third)
    assert metadata_of(third) == metadata_of(first)
    assert third.read_bytes() == first.read_bytes()
    assert told.items() <= metadata_of(second).items()
    assert load_file(second).keys() == lora_of("sd").keys()
    assert read_tensors(second)[1]["modelspec.title"] == "first"

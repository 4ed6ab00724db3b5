"""Every conversion of a LoRA loads in stock diffusers and draws the same pictures, to the bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext.families.lora_files import check_loaded_lora, export_lora
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora
from tests.tiny_pipelines import sdxl_pipeline

UNET = ("attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.0.proj", "proj_in")
TEXT = ("q_proj", "out_proj", "fc1")
PATHS = (["diffusers"], ["kohya"], ["kohya", "diffusers"], ["diffusers", "kohya", "diffusers"])


def save(pipeline, folder, components) -> None:
    arguments = {}
    for name in components:
        model = getattr(pipeline, name)
        add_random_lora(model, UNET if name == "unet" else TEXT)  # of scale 2
        arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        arguments[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(folder, **arguments)


def draw(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    run = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
    return pipeline("a red seven", **run).images


@pytest.mark.parametrize(
    ("build", "components"),
    [
        (random_digits_pipeline, ("unet",)),
        (random_digits_pipeline, ("unet", "text_encoder")),
        (sdxl_pipeline, ("unet",)),
        (sdxl_pipeline, ("unet", "text_encoder", "text_encoder_2")),
        (sdxl_pipeline, ("text_encoder_2",)),
    ],
)
def test_every_conversion_draws_the_same_to_the_bit(tmp_path, build, components):
    save(build(), tmp_path, components)
    original, base = build(), draw(build())
    assert isinstance(original, StableDiffusionPipeline | StableDiffusionXLPipeline)
    original.load_lora_weights(tmp_path)
    expected, count = draw(original), check_loaded_lora(original)
    assert (expected - base).abs().max() > 0.01
    for path in PATHS:
        source = tmp_path / "pytorch_lora_weights.safetensors"
        for format in path:
            target = tmp_path / "-".join(path) / f"{format}.safetensors"
            export_lora(source, format, target.with_stem(f"{source.stem}-{format}"))
            source = target.with_stem(f"{source.stem}-{format}")
        stock = build()
        stock.load_lora_weights(source)
        assert check_loaded_lora(stock) == count, path
        assert draw(stock).equal(expected), path


def test_names_do_not_depend_on_the_installed_transformers(tmp_path):
    components = ("unet", "text_encoder", "text_encoder_2")
    pipeline = sdxl_pipeline()
    save(pipeline, tmp_path, components)
    names = set(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    flat = not hasattr(pipeline.text_encoder, "text_model")  # from transformers 5 on
    assert any(name.startswith("text_encoder.encoder.") for name in names) == flat
    written = set(export_lora(tmp_path))
    text = [name for name in written if name.startswith("text_encoder")]
    assert text
    assert all(".text_model.encoder.layers." in name for name in text)
    assert set(export_lora(export_lora(tmp_path, "kohya"))) == written


def test_an_sdxl_lora_from_kohya_names_loads_in_stock_diffusers():
    pipeline, kohya = sdxl_pipeline(), {}
    for part, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                name = name if name.startswith("text_model.") else "text_model." + name
                key = prefix + name.replace(".", "_")
                kohya[key + ".lora_down.weight"] = torch.randn(2, module.in_features)
                kohya[key + ".lora_up.weight"] = torch.randn(module.out_features, 2)
                kohya[key + ".alpha"] = torch.tensor(2.0)
    first, second = sdxl_pipeline(), sdxl_pipeline()
    first.load_lora_weights(dict(kohya))  # stock diffusers reads the original
    second.load_lora_weights(diffusers_ext.export_lora(kohya, "diffusers"))
    assert draw(second).equal(draw(first))

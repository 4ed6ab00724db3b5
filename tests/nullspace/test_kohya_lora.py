from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_ext.nullspace.debleed import debleed_lora
from diffusers_ext.nullspace.lora_files import export_lora, read_lora
from diffusers_ext.nullspace.lora_formats import is_kohya_lora, read_kohya_lora
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora


TARGETS = ("attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A LoRA of all kinds of layers, the text encoder's too, of scale 2 in the UNet."""
    folder, pipeline = tmp_path_factory.mktemp("lora"), random_digits_pipeline()
    add_random_lora(pipeline.unet, TARGETS)
    add_random_lora(pipeline.text_encoder, ("q_proj", "out_proj", "fc1"))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    return folder


def test_what_was_written_for_kohya_is_read_again(saved, tmp_path):
    file = tmp_path / "kohya.safetensors"
    written = export_lora(saved, "kohya", file)
    assert is_kohya_lora(written)
    found, expected = read_lora(file), read_lora(saved)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-6)


def test_a_lora_read_from_kohyas_names_draws_the_same_in_stock_diffusers(tmp_path):
    pipeline = random_digits_pipeline()
    add_random_lora(pipeline.unet, TARGETS)
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    export_lora(tmp_path, "kohya", tmp_path / "kohya.safetensors")
    export_lora(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "back.safetensors")
    pictures = []
    for name in ("kohya.safetensors", "back.safetensors"):
        pipeline = random_digits_pipeline()
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        generator = torch.Generator().manual_seed(0)
        run = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
        pictures.append(pipeline("a red seven", **run).images)
    assert torch.allclose(*pictures, atol=1e-5)


def test_a_scale_is_folded_into_b():
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    raw = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    linear = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    found = read_kohya_lora({**raw, f"{name}.alpha": torch.tensor(1.0)})
    assert found.keys() == {f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"}
    assert found[f"{linear}.lora_A.weight"].equal(down)
    assert found[f"{linear}.lora_B.weight"].equal(up / 2)
    assert read_kohya_lora(raw)[f"{linear}.lora_B.weight"].equal(up)


def test_blocks_as_the_authors_of_sdxl_count_them():
    raw = {}
    for block in ("input_blocks_4_1", "middle_block_1", "output_blocks_0_1"):
        name = f"lora_unet_{block}_transformer_blocks_3_attn2_to_v"
        raw |= {f"{name}.lora_down.weight": torch.ones(1, 4)}
        raw |= {f"{name}.lora_up.weight": torch.ones(4, 1)}
    modules = {key.rpartition(".lora_")[0] for key in read_kohya_lora(raw)}
    assert modules == {
        f"unet.{block}.transformer_blocks.3.attn2.to_v"
        for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0",
                      "up_blocks.0.attentions.0")
    }  # fmt: skip


def test_debleeding_a_lora_of_kohyas_names(few_statistics, tmp_path):
    pipeline = random_digits_pipeline()
    add_random_lora(pipeline.unet, ("attn2.to_k", "attn2.to_v"))
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    export_lora(tmp_path, "kohya", tmp_path / "kohya.safetensors")
    found = debleed_lora(tmp_path / "kohya.safetensors", few_statistics, damping=1e-3)
    expected = debleed_lora(tmp_path, few_statistics, damping=1e-3)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-6) for key in expected)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("hada_w1_a",), "must end in one of .*, got 'lora_unet_x.hada_w1_a'"),
        (("lora_down.weight", "lora_up.weight", "dora_scale"), "got 'lora_unet_x.dora_scale'"),
        (
            ("lora_down.weight", "alpha"),
            r"other.safetensors: .* have A and B, got .* for 'lora_unet_x'",
        ),
    ],
)
def test_other_adapters_are_refused(tmp_path, parts, message):
    file = tmp_path / "other.safetensors"
    save_file({f"lora_unet_x.{part}": torch.ones(2, 2) for part in parts}, file)
    with pytest.raises(ValueError, match=message):
        read_lora(file)

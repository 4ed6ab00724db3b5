from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_ext.core.lora_formats import is_kohya_lora, parse_key, read_kohya_lora
from diffusers_ext.families.lora_files import export_lora, read_lora, write_lora
from diffusers_ext.nullspace.debleed import debleed_lora
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
        (("lora_down.weight", "alpha"), r"other.safetensors: .* have A and B, got .* for 'lora_unet_x'"),
    ],
)
def test_other_adapters_are_refused(tmp_path, parts, message):
    file = tmp_path / "other.safetensors"
    save_file({f"lora_unet_x.{part}": torch.ones(2, 2) for part in parts}, file)
    with pytest.raises(ValueError, match=message):
        read_lora(file)


NAMES = ("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.alpha")
KOHYA = ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
         "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
         "lora_unet_mid_block_attentions_0_proj_in.alpha")  # fmt: skip


def test_a_damaged_lora_is_refused(tmp_path):
    for name, tensors in {
        "nan": {"unet.a.lora_A.weight": torch.full((1, 4), float("nan")),
                "unet.a.lora_B.weight": torch.ones(4, 1)},
        "rank": {"unet.a.lora_A.weight": torch.ones(1, 4), "unet.a.lora_B.weight": torch.ones(4, 2)},
    }.items():  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=name):  # the message names the file
            export_lora(tmp_path / f"{name}.safetensors", output_path=tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("names", [NAMES, KOHYA])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((torch.ones(1, 4),), "must have A and B"),
        ((torch.ones(2, 4), torch.ones(4, 1)), "must have one rank"),
        ((torch.ones(0, 4), torch.ones(4, 0)), "must have one rank"),
        ((torch.ones(4), torch.ones(4)), "must both be of a Linear"),
        ((torch.ones(1, 4, 1, 1), torch.ones(4, 1)), "must both be of a Linear"),
        ((torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3)), "must be 1 x 1"),
        ((torch.ones(1, 4).int(), torch.ones(4, 1)), "in float16 or .*, got int32"),
        ((torch.ones(1, 4), torch.full((4, 1), float("inf"))), "must hold finite numbers"),
        ((torch.ones(1, 4), torch.ones(4, 1), torch.ones(2)), "alpha must be one number"),
        ((torch.ones(1, 4), torch.ones(4, 1), torch.tensor(float("nan"))), "finite numbers"),
        (
            (torch.ones(1, 4).half(), torch.full((4, 1), 6e4).half(), torch.tensor(4.0)),
            "B times its scale 4 must be finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_file(tmp_path, names, parts, message):
    file = tmp_path / "damaged.safetensors"
    save_file(dict(zip(names, parts)), file)
    with pytest.raises(ValueError, match=f"damaged.safetensors.*{message}"):
        read_lora(file)


def test_convolutions_are_read(tmp_path):
    a, b = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
    assert len(read_lora(dict(zip(NAMES, (a, b))))) == 2


def test_two_spellings_of_one_module_are_refused():
    pair = dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1))))
    for second in ("unet.a.lora.down.weight", "base_model.model.a.lora_A.weight"):
        with pytest.raises(ValueError, match=f"one A for every module, .* as '{second}'"):
            read_lora({**pair, second: torch.zeros(1, 4)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[" * 100_000, "must hold JSON"),
        ("{", "must hold JSON"),
        ("[1]", "must hold a JSON object"),
        ({"unet.lora_alpha": "2"}, "finite number as 'unet.lora_alpha', got '2'"),
        ({"unet.lora_alpha": float("nan")}, "finite number"),
        ({"unet.alpha_pattern": ["a"]}, "names and numbers as 'unet.alpha_pattern'"),
        ({"unet.alpha_pattern": {"(a+)+!": 1}}, "must hold module names .* pattern"),
        ({"unet.alpha_pattern": {"a": True}}, "finite number"),
        ({"unet.r": 4}, "the rank of 'a' must be 4 as in the file's metadata, got 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_file(tmp_path, settings, message):
    file = tmp_path / "damaged.safetensors"
    text = settings if isinstance(settings, str) else json.dumps(settings)
    pair = dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1))))
    save_file(pair, file, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"damaged.safetensors.*{message}"):
        read_lora(file)


def test_what_was_altered_after_writing_is_found(tmp_path):
    file = tmp_path / "mine.safetensors"
    write_lora(dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1)))), file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # still finite, of the same shape
    file.write_bytes(content)
    with pytest.raises(ValueError, match="mine.safetensors must have the contents"):
        read_lora(file)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = "encoder.layers.0.self_attn"


def test_every_spelling_names_one_module(subtests):
    for key, component, module, part in [
        (f"unet.{BLOCK}.attn2.to_k.lora_A.weight", "unet", f"{BLOCK}.attn2.to_k", "A"),
        (f"unet.{BLOCK}.attn2.to_k.lora.up.weight", "unet", f"{BLOCK}.attn2.to_k", "B"),
        (f"{BLOCK}.attn2.to_k.alpha", "unet", f"{BLOCK}.attn2.to_k", "alpha"),
        (f"base_model.model.{BLOCK}.attn2.to_v.lora_B.weight", "unet", f"{BLOCK}.attn2.to_v", "B"),
        (
            f"base_model.model.{BLOCK}.ff.net.2.lora_A.default.weight",
            "unet", f"{BLOCK}.ff.net.2", "A",
        ),
        (
            f"unet.base_model.model.{BLOCK}.attn1.to_out.0.lora_A.weight",
            "unet", f"{BLOCK}.attn1.to_out.0", "A",
        ),
        (
            f"unet.{BLOCK}.attn2.processor.to_k_lora.down.weight",
            "unet", f"{BLOCK}.attn2.to_k", "A",
        ),
        (
            f"{BLOCK}.attn2.processor.to_out_lora.up.weight",
            "unet", f"{BLOCK}.attn2.to_out.0", "B",
        ),
        (
            f"unet.{BLOCK}.attn1.processor.to_q.lora_A.weight",
            "unet", f"{BLOCK}.attn1.to_q", "A",
        ),
        (f"text_encoder.{LAYER}.q_proj.lora_A.weight", "text_encoder",
         f"text_model.{LAYER}.q_proj", "A"),
        (f"text_encoder_2.text_model.{LAYER}.q_proj.lora_A.weight", "text_encoder_2",
         f"text_model.{LAYER}.q_proj", "A"),
        (f"text_encoder.{LAYER}.to_out_lora.down.weight", "text_encoder",
         f"text_model.{LAYER}.out_proj", "A"),
        (f"base_model.model.text_model.{LAYER}.k_proj.lora_B.weight", "text_encoder",
         f"text_model.{LAYER}.k_proj", "B"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
         "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", "A"),
        ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "transformer",
         "transformer_blocks.0.attn.to_k", "A"),
        ("transformer_blocks.0.attn.to_k.lora_A.weight", "transformer",
         "transformer_blocks.0.attn.to_k", "A"),
        ("transformer_2.blocks.0.attn2.to_k.lora_A.weight", "transformer_2",
         "blocks.0.attn2.to_k", "A"),
    ]:  # fmt: skip
        with subtests.test(key=key, component=component, module=module, part=part):
            assert parse_key(key)[:3] == (component, module, part)


def test_metadata_is_looked_up_by_the_name_as_written():
    key = f"text_encoder.{LAYER}.q_proj.lora_A.weight"
    assert parse_key(key).written == f"{LAYER}.q_proj"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unet.a.weight", "must end in one of .*, got 'unet.a.weight'.$"),
        ("unet.a.lora_magnitude_vector", "DoRA is not supported"),
        (
            "diffusion_model.input_blocks.1.1.proj_in.lora_A.weight",
            "must be named as in diffusers .* got 'diffusion_model.input_blocks.1.1.proj_in', a name",
        ),
    ],
)
def test_other_names_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        parse_key(key)

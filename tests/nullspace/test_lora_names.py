from __future__ import annotations

import pytest

from diffusers_ext.nullspace.lora_formats import parse_key


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

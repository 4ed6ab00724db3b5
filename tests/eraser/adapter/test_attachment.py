"""Erasers on the real classes of every family that says where they attach, tiny and random."""

from __future__ import annotations

import gc
import json
import threading

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import attention_width, joint_attentions
from diffusers_ext.eraser.adapter.outputs import eraser_layers, eraser_outputs, erasers_disabled
from diffusers_ext.eraser.files import load_eraser, save_eraser
from tests.tiny_models import TinyModel, flux, sd3, sd_unet, sdxl_unet, wan, z_image


def hunyuan_video() -> TinyModel:
    """Double blocks alone have erasers; the refiner of the text has attentions of the same name."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 4, 8),
        guidance_embeds=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor([10, 10]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "encoder_attention_mask": torch.ones(2, 7),
        "pooled_projections": torch.randn(2, 10),
    }
    return TinyModel(transformer.eval(), inputs)


def flux2() -> TinyModel:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.cartesian_prod(*[torch.arange(n).float() for n in (1, 4, 4, 1)]),
        "txt_ids": torch.zeros(7, 4),
    }
    return TinyModel(transformer.eval(), inputs)


def ltx2() -> TinyModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24}
    streams = {**sizes, "in_channels": 4, "out_channels": 4}
    transformer = LTX2VideoTransformer3DModel(
        **streams,
        **{f"audio_{name}": value for name, value in streams.items()},
        num_layers=1,
        caption_channels=24,
        rope_double_precision=False,
        rope_type="split",
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 4),
        "audio_hidden_states": torch.randn(2, 3, 4),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "audio_encoder_hidden_states": torch.randn(2, 7, 24),
        "timestep": torch.full((2, 8), 10.0),
        "audio_timestep": torch.full((2, 3), 10.0),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "audio_num_frames": 3,
    }
    return TinyModel(transformer.eval(), inputs)


UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
# Where the erasers are, and how many.
PLACES = {
    wan: ("blocks.0.attn2", 2),
    hunyuan_video: ("transformer_blocks.0.attn", 2),
    flux: ("transformer_blocks.0.attn", 1),
    flux2: ("transformer_blocks.0.attn", 1),
    sd3: ("transformer_blocks.0.attn", 2),
    z_image: ("layers.0.attention", 2),
    ltx2: ("transformer_blocks.0.attn2", 1),
    sd_unet: (UNET, 4),
    sdxl_unet: (UNET, 8),
}


@pytest.fixture(params=PLACES, ids=lambda build: build.__name__)
def tiny(request) -> TinyModel:
    return request.param()


def erase(model: torch.nn.Module, name: str = "seven", **settings) -> None:
    torch.manual_seed(1)
    model.add_adapter(EraserConfig(**{"r": 4, "init_weights": False} | settings), name)


def changed(tiny: TinyModel, base: torch.Tensor) -> bool:
    return not torch.equal(tiny.run(), base)


@torch.no_grad()
def test_it_is_added_switched_and_unloaded_to_the_bit(tiny, request):
    first, count = PLACES[request.node.callspec.params["tiny"]]
    model, base, keys = tiny.model, tiny.run(), list(tiny.model.state_dict())
    erase(model)
    layers = eraser_layers(model)
    assert list(layers) == list(joint_attentions(model))
    assert (next(iter(layers)), len(layers)) == (first, count)
    assert [key for key in model.state_dict() if ".eraser_" not in key] == keys
    erased = tiny.run()
    assert not torch.equal(erased, base)
    with erasers_disabled(model):
        assert torch.equal(tiny.run(), base)
    model.set_adapters("seven", 0.0)
    assert torch.equal(tiny.run(), base)
    model.set_adapters("seven", 1.0)
    assert torch.equal(tiny.run(), erased)
    with eraser_outputs(model) as outputs:
        tiny.run()
    assert {name: output.shape[-1] for name, output in outputs.items()} == {
        name: attention_width(attention) for name, attention in joint_attentions(model).items()
    }
    model.unload_lora()
    assert torch.equal(tiny.run(), base)
    del layers
    gc.collect()
    assert not any(part._forward_hooks for part in model.modules())


@torch.no_grad()
def test_a_lora_beside_it_changes_nothing_of_it(tiny):
    model, base = tiny.model, tiny.run()
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    model.add_adapter(lora, "style")
    styled = tiny.run()
    erase(model)
    model.set_adapters(["style", "seven"])
    both = tiny.run()
    model.set_adapters("seven")
    erased = tiny.run()
    assert len({output.sum().item() for output in (base, styled, both, erased)}) == 4
    model.delete_adapters("style")
    torch.testing.assert_close(tiny.run(), erased)
    model.delete_adapters("seven")
    torch.testing.assert_close(tiny.run(), base)


@torch.no_grad()
def test_it_is_float32_beside_a_model_in_half_precision(tiny):
    model = tiny.model.to(torch.bfloat16)
    for name, value in tiny.inputs.items():
        if isinstance(value, list):
            tiny.inputs[name] = [part.to(torch.bfloat16) for part in value]
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and "ids" not in name:
            tiny.inputs[name] = value.to(torch.bfloat16)
    added = tiny.inputs.get("added_cond_kwargs", {})
    tiny.inputs.update({"added_cond_kwargs": {n: v.to(torch.bfloat16) for n, v in added.items()}} if added else {})
    base = tiny.run()
    erase(model)
    assert {p.dtype for name, p in model.named_parameters() if ".eraser_" in name} == {torch.float32}
    erased = tiny.run()
    assert erased.dtype == base.dtype
    assert not torch.equal(erased, base)
    with erasers_disabled(model):
        assert torch.equal(tiny.run(), base)


@torch.no_grad()
def test_a_saved_one_comes_back_to_the_bit_and_fits_no_other_model(tiny, tmp_path):
    erase(tiny.model, concept="seven")
    erased = tiny.run()
    save_eraser(tiny.model, tmp_path)
    tiny.model.unload_lora()
    assert changed(tiny, erased)
    load_eraser(tiny.model, tmp_path)
    assert torch.equal(tiny.run(), erased)
    other = (sd3 if isinstance(tiny.model, type(wan().model)) else wan)()
    before = list(other.model.state_dict())
    with pytest.raises(ValueError, match="The eraser must "):
        load_eraser(other.model, tmp_path)
    assert list(other.model.state_dict()) == before


@torch.no_grad()
def test_switching_off_is_for_one_thread(tiny):
    base, found = tiny.run(), []
    erase(tiny.model)
    erased = tiny.run()
    with erasers_disabled(tiny.model):
        thread = threading.Thread(target=lambda: found.append(changed(tiny, erased)))
        thread.start()
        thread.join()
        assert not changed(tiny, base)
    assert found == [False]


@pytest.mark.parametrize("build", [wan, hunyuan_video, sd3])
def test_some_blocks_only(build):
    model = build().model
    erase(model, layers_to_transform=[1])
    names = list(joint_attentions(model))
    assert list(eraser_layers(model)) == names[1:]
    assert model.peft_config["seven"].num_layers == 2


def test_widths_of_a_unet_bound_the_rank():
    model = sdxl_unet().model
    widths = {attention_width(attention) for attention in joint_attentions(model).values()}
    with pytest.raises(ValueError, match=f"`r` must be at most the width of the model, {min(widths)}, got 999"):
        erase(model, r=999)
    erase(model, r=min(widths))
    assert model.peft_config["seven"].in_features == max(widths)


@torch.no_grad()
def test_of_z_image_s_one_stream_the_picture_s_tokens_alone_are_changed():
    tiny, streams = z_image(), []
    attention = tiny.model.layers[0].attention
    hook = attention.register_forward_hook(lambda _, __, output: streams.append(output))
    tiny.run()
    hook.remove()
    erase(tiny.model)
    hook = attention.register_forward_hook(lambda _, __, output: streams.append(output))
    with eraser_outputs(tiny.model) as outputs:
        tiny.run()
    hook.remove()
    before, after = streams
    # 16 tokens of a picture of 8 x 8 latents, padded to 32; then 32 or 64 of text.
    assert before.shape == (2, 96, 32)
    changed_rows = (before != after).any(-1)
    assert changed_rows[:, :16].all()
    assert not changed_rows[:, 16:].any()
    recorded = outputs["layers.0.attention"]
    torch.testing.assert_close(before + recorded, after)
    other = ZImageTransformer2DModel.from_config(tiny.model.config, siglip_feat_dim=8)
    with pytest.raises(ValueError, match="`model` must be of Z-Image from text alone, .* order of tokens"):
        erase(other)
    with pytest.raises(ValueError, match="with an eraser must be called with `freqs_cis`, got none"):
        attention(before)


@pytest.mark.parametrize("kind", ["gelu", "linear"])
@torch.no_grad()
def test_erasers_of_ltx_2_beside_its_own_attention_load_as_before(kind, tmp_path):
    tiny = ltx2()
    base = tiny.run()
    erase(tiny.model, concept="seven", kind=kind, target_modules=["attn1.to_out.1"])
    erased = tiny.run()
    save_eraser(tiny.model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["attn1.to_out.1"]
    tiny.model.unload_lora()
    name = load_eraser(tiny.model, tmp_path)
    assert list(eraser_layers(tiny.model)) == ["transformer_blocks.0.attn1"]
    assert torch.equal(tiny.run(), erased)
    erase(tiny.model, "three")  # one of today beside it
    assert list(eraser_layers(tiny.model)) == [f"transformer_blocks.0.attn{i}" for i in (1, 2)]
    tiny.model.set_adapters([name, "three"])
    assert changed(tiny, erased)
    tiny.model.set_adapters([name, "three"], [1.0, 0.0])
    assert torch.equal(tiny.run(), erased)
    tiny.model.unload_lora()
    assert torch.equal(tiny.run(), base)


@torch.no_grad()
def test_wan_compiles_without_a_break():
    tiny = wan()
    erase(tiny.model)
    erased = tiny.run()
    compiled = torch.compile(tiny.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tiny.inputs, return_dict=False)[0], erased)

"""Linear erasers are LoRAs: in stock diffusers, under other programs' names, and in the weights."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import eraser_layers, eraser_outputs, erasers_disabled
from diffusers_ext.eraser.files import convert_eraser, eraser_tensors, load_eraser, save_eraser
from diffusers_ext.eraser.formats import read_eraser
from diffusers_ext.eraser.linear import export_eraser_lora, family_of, lora_of_eraser, merge_eraser, unmerge_eraser
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_erasers import VIDEO, add_random_eraser, velocity
from tests.tiny_lora import add_random_lora
from tests.tiny_models import TinyModel, cogvideox, sd_unet, wan, z_image


def erase(model: torch.nn.Module, name: str = "seven", seed: int = 1, **settings) -> None:
    torch.manual_seed(seed)
    model.add_adapter(EraserConfig(**{"r": 3, "kind": "linear", "init_weights": False} | settings), name)


@pytest.fixture(params=[wan, cogvideox, sd_unet, z_image], ids=lambda build: build.__name__)
def tiny(request) -> TinyModel:
    return request.param()


@torch.no_grad()
def test_it_is_a_lora_of_stock_diffusers(tiny, tmp_path):
    model, base = tiny.model, tiny.run()
    erase(model)
    model.set_adapters("seven", 0.7)
    erased = tiny.run()
    family = family_of(model)
    lora = lora_of_eraser(eraser_tensors(model, "seven"), family.denoiser, 0.7)
    export_eraser_lora(lora, tmp_path, family)
    model.unload_lora()
    assert torch.equal(tiny.run(), base)
    model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=family.denoiser)
    assert all(layer.lora_alpha == layer.r for layer in model.modules() if hasattr(layer, "lora_alpha"))
    assert not torch.equal(tiny.run(), base)
    torch.testing.assert_close(tiny.run(), erased, rtol=1e-4, atol=1e-5)


def test_comfyui_reads_it_under_the_names_of_wans_authors(tmp_path):
    model = wan().model
    erase(model)
    lora = lora_of_eraser(eraser_tensors(model, "seven"), "transformer")
    files = export_eraser_lora(lora, tmp_path, family_of(model))
    assert [path.name for path in files] == ["pytorch_lora_weights.safetensors", "comfyui.safetensors"]
    read = load_file(files[1])
    ends = ("alpha", "lora_A.weight", "lora_B.weight")
    assert sorted(read) == [f"diffusion_model.blocks.{i}.cross_attn.o.{end}" for i in (0, 1) for end in ends]
    assert read["diffusion_model.blocks.0.cross_attn.o.alpha"] == 3.0
    assert torch.equal(read["diffusion_model.blocks.1.cross_attn.o.lora_A.weight"], lora[LAST_DOWN])


LAST_DOWN = "transformer.blocks.1.attn2.to_out.0.lora_A.weight"


def test_kohya_reads_it_of_a_unet(tmp_path):
    model = sd_unet().model
    erase(model)
    files = export_eraser_lora(lora_of_eraser(eraser_tensors(model, "seven"), "unet"), tmp_path, family_of(model))
    assert files[1].name == "comfyui_a1111_kohya.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
    assert load_file(files[1])[f"{name}.alpha"] == 3.0


@torch.no_grad()
def test_merged_weights_are_saved_as_an_ordinary_model_and_come_back_to_the_bit(tmp_path):
    tiny = wan()
    model, before, base = tiny.model, {k: v.clone() for k, v in tiny.model.state_dict().items()}, tiny.run()
    erase(model)
    model.set_adapters("seven", 0.5)
    erased, with_eraser = tiny.run(), {k: v.clone() for k, v in model.state_dict().items()}
    assert merge_eraser(model) == "seven"
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(tiny.run(), erased, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = TinyModel(WanTransformer3DModel.from_pretrained(tmp_path), tiny.inputs)
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded.run(), erased, rtol=1e-4, atol=1e-5)
    assert unmerge_eraser(model) == "seven"
    assert all(torch.equal(value, with_eraser[name]) for name, value in model.state_dict().items())
    assert torch.equal(tiny.run(), erased)
    model.unload_lora()
    assert torch.equal(tiny.run(), base)


@torch.no_grad()
def test_merges_beside_a_lora_are_taken_back_in_turn():
    model = tiny_transformer().to(torch.bfloat16)
    add_random_lora(model, adapter_name="style")
    styled = velocity(model, torch.bfloat16)
    erase(model, "a")
    erase(model, "b", seed=2)
    model.set_adapters(["style", "a", "b"], [1.0, 0.5, 1.0])
    expected = velocity(model, torch.bfloat16)
    merge_eraser(model, "a")
    merge_eraser(model, "b")
    torch.testing.assert_close(velocity(model, torch.bfloat16), expected, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="must be the eraser that was merged last, 'b', got 'a'"):
        unmerge_eraser(model, "a")
    assert [unmerge_eraser(model), unmerge_eraser(model)] == ["b", "a"]
    assert torch.equal(velocity(model, torch.bfloat16), expected)
    model.delete_adapters(["a", "b"])
    assert torch.equal(velocity(model, torch.bfloat16), styled)


def test_gelu_is_refused_with_the_remedy():
    model = tiny_transformer()
    add_random_eraser(model, "seven")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="'linear' to be merged, got 'seven' of the kind 'gelu'.*--kind linear"):
        merge_eraser(model)
    with pytest.raises(ValueError, match="'linear' to be a LoRA, got 'gelu'.*--kind linear"):
        lora_of_eraser(eraser_tensors(model, "seven"), "transformer")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="got None"):
        unmerge_eraser(model)


@torch.no_grad()
def test_it_saves_loads_and_switches_like_others(tiny, tmp_path):
    model, base = tiny.model, tiny.run()
    erase(model, concept="seven")
    erased = tiny.run()
    with erasers_disabled(model):
        assert torch.equal(tiny.run(), base)
    save_eraser(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["kind"] == "linear"
    assert read_eraser(tmp_path / "saved").config.kind == "linear"
    model.unload_lora()
    load_eraser(model, tmp_path / "saved")
    torch.testing.assert_close(tiny.run(), erased, rtol=1e-4, atol=1e-5)
    convert_eraser(tmp_path / "saved", tmp_path / "again", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    with pytest.raises(ValueError, match="`format` must be 'peft' for an eraser of the kind 'linear'"):
        convert_eraser(tmp_path / "saved", tmp_path / "legacy", "legacy")


@torch.no_grad()
def test_what_it_adds_to_the_video_is_read_beside_others():
    model = tiny_transformer()
    erase(model, "linear")
    add_random_eraser(model, "gelu")
    model.set_adapters(["linear", "gelu"])
    for name in (None, "linear", "gelu"):
        with eraser_outputs(model, name) as outputs:
            velocity(model)
        assert {output.shape for output in outputs.values()} == {(2, VIDEO, 32)}
    layer = next(iter(eraser_layers(model).values()))
    assert layer._recorded.take() == {}


def test_gradients_reach_both_projections():
    tiny = wan()
    erase(tiny.model)
    tiny.run().square().mean().backward()
    for parameter in eraser_tensors(tiny.model, "seven").values():
        assert parameter.grad.abs().sum() > 0


def test_a_copy_has_hooks_of_its_own():
    import copy

    tiny = wan()
    erase(tiny.model)
    with torch.no_grad():
        erased = tiny.run()
        twin = TinyModel(copy.deepcopy(tiny.model), tiny.inputs)
        tiny.model.set_adapters("seven", 0.0)
        assert torch.equal(twin.run(), erased)
        assert not torch.equal(tiny.run(), erased)
        twin.model.set_adapters("seven", 0.0)
        assert torch.equal(tiny.run(), twin.run())

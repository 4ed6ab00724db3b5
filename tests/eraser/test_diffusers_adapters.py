"""Erasers under the adapter methods of diffusers' models and pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.peft_utils import get_adapter_name
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser, velocity
from tests.tiny_lora import add_random_lora

# PEFT warns of every further adapter; a LoRA brings its own warning.
A_LORA_BESIDE = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def hooked(model: torch.nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if part._forward_hooks]


def two_erasers() -> tuple[torch.nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """A model with erasers "a" and "b" ("b" active), its base output and that of each alone."""
    model = tiny_transformer()
    base, alone = velocity(model), {}
    for seed, name in enumerate("ab"):
        add_random_eraser(model, name, seed)
        alone[name] = velocity(model)
    return model, base, alone


def test_erasers_stack_each_with_its_scale():
    model, base, alone = two_erasers()
    assert model.active_adapters() == ["b"]
    model.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(velocity(model), alone["a"])
    model.set_adapters(["b", "a"], [1.0, 0.0])
    assert torch.equal(velocity(model), alone["b"])
    model.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(velocity(model), base)
    model.set_adapters(["a", "b"], [0.3, 0.6])
    both = velocity(model)
    scalings = [layer.scaling for layer in eraser_layers(model).values()]
    assert scalings == [{"a": 0.3, "b": 0.6}] * 2
    model.set_adapter("a")
    assert not torch.equal(velocity(model), both)
    model.set_adapters("a")
    assert torch.equal(velocity(model), alone["a"])


def test_half_a_scale_lies_in_between():
    model = tiny_transformer()
    base = velocity(model)
    add_random_eraser(model, "a")
    distances = []
    for scale in (0.0, 0.5, 1.0, 1.3):
        model.set_adapters("a", scale)
        distances.append((velocity(model) - base).norm().item())
    assert distances[0] == 0.0
    assert distances == sorted(distances)
    assert len(set(distances)) == 4


@pytest.mark.parametrize("factor", [0, 0.5, 1.7])
def test_the_scale_of_a_call_multiplies_and_passes(factor):
    model, _, _ = two_erasers()
    model.set_adapters(["a", "b"], [0.3 * factor, 0.6 * factor])
    expected = velocity(model)
    model.set_adapters(["a", "b"], [0.3, 0.6])
    before = velocity(model)
    during = velocity(model, attention_kwargs={"scale": factor})
    torch.testing.assert_close(during, expected)
    assert not torch.equal(during, before)
    assert torch.equal(velocity(model), before)
    assert [layer.scaling for layer in eraser_layers(model).values()] == [{"a": 0.3, "b": 0.6}] * 2


def test_disabled_adapters_are_the_base():
    model, base, alone = two_erasers()
    for off, on in (("disable_adapters", "enable_adapters"), ("disable_lora", "enable_lora")):
        getattr(model, off)()
        assert torch.equal(velocity(model), base)
        getattr(model, on)()
        assert torch.equal(velocity(model), alone["b"])


def test_deleted_erasers_are_gone_with_their_hooks():
    model, base, alone = two_erasers()
    model.set_adapters(["a", "b"])
    model.delete_adapters("b")
    assert torch.equal(velocity(model), alone["a"])
    assert list(model.peft_config) == ["a"]
    assert len(hooked(model)) == 2
    model.delete_adapters("a")
    assert torch.equal(velocity(model), base)
    assert hooked(model) == []
    assert eraser_layers(model) == {}
    assert list(model.state_dict()) == list(tiny_transformer().state_dict())
    add_random_eraser(model, "a", 0)
    assert torch.equal(velocity(model), alone["a"])


def test_unloading_leaves_nothing_behind():
    model, base, _ = two_erasers()
    keys = list(tiny_transformer().state_dict())
    model.unload_lora()
    assert torch.equal(velocity(model), base)
    assert hooked(model) == []
    assert list(model.state_dict()) == keys
    assert not any("base_layer" in name for name, _ in model.named_modules())


@A_LORA_BESIDE
@pytest.mark.parametrize("eraser_first", [True, False])
def test_a_lora_before_or_after_keeps_its_keys(eraser_first):
    model = tiny_transformer()
    add_random_lora(model, adapter_name="style")
    with_lora, keys = velocity(model), get_peft_model_state_dict(model, adapter_name="style")
    model = tiny_transformer()
    if eraser_first:
        add_random_eraser(model, "seven")
        with_eraser = velocity(model)
        add_random_lora(model, adapter_name="style")
    else:
        add_random_lora(model, adapter_name="style")
        add_random_eraser(model, "seven")
        with_eraser = velocity(model)
    assert list(get_peft_model_state_dict(model, adapter_name="style")) == list(keys)
    model.set_adapters("style")
    assert torch.equal(velocity(model), with_lora)
    model.set_adapters("seven")
    assert torch.equal(velocity(model), with_eraser)
    model.set_adapters(["style", "seven"], [1.0, 0.7])
    assert not torch.equal(velocity(model), with_lora)
    assert all(layer.scaling["seven"] == 0.7 for layer in eraser_layers(model).values())
    model.delete_adapters("style")
    model.set_adapters("seven")
    assert torch.equal(velocity(model), with_eraser)


@A_LORA_BESIDE
def test_a_lora_beside_an_eraser_is_fused_by_name():
    model = tiny_transformer()
    add_random_eraser(model, "seven")
    add_random_lora(model, adapter_name="style")
    model.set_adapters(["style", "seven"])
    expected = velocity(model)
    model.fuse_lora(adapter_names=["style"])
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Erasers cannot be merged"):
        model.fuse_lora()


def test_weights_move_between_models_by_state_dict():
    model, twin = tiny_transformer(), tiny_transformer()
    add_random_eraser(model, "seven")
    twin.add_adapter(EraserConfig(r=4), "other")
    weights = get_peft_model_state_dict(model, adapter_name="seven")
    result = set_peft_model_state_dict(twin, weights, "other")
    assert not result.unexpected_keys
    assert torch.equal(velocity(twin), velocity(model))


def test_the_saved_base_is_a_base(tmp_path):
    pipeline = tiny_video_pipeline()
    base = velocity(pipeline.transformer)
    add_random_eraser(pipeline.transformer, "seven")
    for layer in eraser_layers(pipeline.transformer).values():
        names = list(layer.state_dict())
        assert names[0].startswith("eraser_down.seven")
    pipeline.transformer.unload_lora()
    pipeline.transformer.save_pretrained(tmp_path)
    again = pipeline.transformer.from_pretrained(tmp_path)
    assert torch.equal(velocity(again), base)


def test_pipelines_list_scale_and_unload_erasers():
    pipeline = tiny_video_pipeline()
    base = velocity(pipeline.transformer)
    add_random_eraser(pipeline.transformer, "seven")
    erased = velocity(pipeline.transformer)
    assert pipeline.get_active_adapters() == ["seven"]
    assert pipeline.get_list_adapters() == {"transformer": ["seven"]}
    assert get_adapter_name(pipeline.transformer) == "default_1"
    pipeline.set_adapters("seven", 0.5)
    assert all(x.scaling == {"seven": 0.5} for x in eraser_layers(pipeline.transformer).values())
    pipeline.disable_lora()
    assert torch.equal(velocity(pipeline.transformer), base)
    pipeline.enable_lora()
    pipeline.set_adapters("seven")
    assert torch.equal(velocity(pipeline.transformer), erased)
    pipeline.unload_lora_weights()
    assert torch.equal(velocity(pipeline.transformer), base)
    assert hooked(pipeline.transformer) == []


def test_fused_projections_and_longer_prompts():
    model = tiny_transformer()
    add_random_eraser(model, "seven")
    expected = velocity(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(velocity(model), expected)


@A_LORA_BESIDE
def test_a_lora_can_be_moved_beside_an_eraser():
    pipeline = tiny_video_pipeline()
    add_random_eraser(pipeline.transformer, "dog")
    add_random_lora(pipeline.transformer, adapter_name="style")
    pipeline.transformer.set_adapters(["dog", "style"])
    expected = velocity(pipeline.transformer)
    pipeline.set_lora_device(["style", "dog"], "cpu")
    assert torch.equal(velocity(pipeline.transformer), expected)


def test_a_negative_scale_is_refused_and_changes_nothing():
    model, _, _ = two_erasers()
    model.set_adapters(["a", "b"], [0.3, 0.6])
    before = velocity(model)
    with pytest.raises(ValueError, match="`scale` of the eraser 'a' must .* strengthens the concept"):
        model.set_adapters(["a", "b"], [-1.0, 0.5])
    with pytest.raises(ValueError, match="at least 0, got -0.3"):
        velocity(model, attention_kwargs={"scale": -1})
    assert torch.equal(velocity(model), before)

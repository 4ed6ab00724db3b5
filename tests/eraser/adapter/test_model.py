from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.adapter.model import attention_width
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_current_pipelines import tiny_auraflow_pipeline
from tests.tiny_erasers import add_random_eraser, velocity
from tests.tiny_lora import add_random_lora

LEAF = "transformer_blocks.0.attn1.to_out.1"


def eraser_config(**settings) -> EraserConfig:
    return EraserConfig(**({"r": 4, "init_weights": False} | settings))


def random_peft_model(**overrides) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_transformer(**overrides), eraser_config(concept="seven"))


def state_of(model: torch.nn.Module) -> dict:
    """Everything that adding an adapter could change."""
    return {
        "modules": {name: type(part) for name, part in model.named_modules()},
        "training": [part.training for part in model.modules()],
        "hooks": {n: len(p._forward_hooks) for n, p in model.named_modules()},
        "trainable": {name: part.requires_grad for name, part in model.named_parameters()},
        "adapters": list(getattr(model, "peft_config", {})),
        "loaded": bool(model._hf_peft_config_loaded),
    }


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model", "add_adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_eraser_changes_no_bit_and_is_float32(way, dtype):
    model, config = tiny_transformer().to(dtype), EraserConfig(r=4)
    base, keys = velocity(model, dtype), list(model.state_dict())
    if way == "add_adapter":
        model.add_adapter(config, "seven")
    else:
        wrap = get_peft_model if way == "get_peft_model" else inject_adapter_in_model
        arguments = (model, config) if way == "get_peft_model" else (config, model)
        assert wrap(*arguments, adapter_name="seven") is not None
    assert torch.equal(velocity(model, dtype), base)
    erasers = {name: part for name, part in model.named_parameters() if ".eraser_" in name}
    assert {part.dtype for part in erasers.values()} == {torch.float32}
    assert {part.dtype for name, part in model.named_parameters() if name not in erasers} == {dtype}
    assert {n for n, part in model.named_parameters() if part.requires_grad} == set(erasers)
    assert [key for key in model.state_dict() if ".eraser_" not in key] == keys
    assert len(erasers) == 2 * 4
    for layer in eraser_layers(model).values():
        torch.nn.init.ones_(layer.eraser_up["seven"].bias)
    assert not torch.equal(velocity(model, dtype), base)
    assert velocity(model, dtype).dtype == dtype


def test_the_config_of_the_user_stays_as_it_was():
    config = EraserConfig(r=4)
    for layers, heads in ((1, 1), (2, 2)):
        model = tiny_transformer(num_layers=layers, num_attention_heads=heads)
        model.register_to_config(_name_or_path="someone/tiny")
        filled = get_peft_model(model, config).peft_config["default"]
        assert (filled.num_layers, filled.in_features) == (layers, 16 * heads)
        assert filled.base_model_name_or_path == "someone/tiny"
    assert config == EraserConfig(r=4)


def test_peft_adapters_are_added_switched_and_deleted():
    model = random_peft_model()
    with model.disable_adapter():
        base = velocity(model)
    assert torch.equal(base, velocity(tiny_transformer()))
    first = velocity(model)
    torch.manual_seed(1)
    model.add_adapter("second", eraser_config())
    assert torch.equal(velocity(model), first)
    model.set_adapter("second")
    second = velocity(model)
    model.base_model.set_adapter(["default", "second"])
    sums = {tensor.sum().item() for tensor in (base, first, second, velocity(model))}
    assert len(sums) == 4
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert torch.equal(velocity(model), second)


def test_unload_gives_the_base_model_back():
    base = tiny_transformer()
    before, expected = state_of(base), velocity(base)
    model = get_peft_model(base, eraser_config())
    assert not torch.equal(velocity(model), expected)
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(velocity(base), expected)
    assert not any(".base_layer" in name for name, _ in base.named_modules())
    after = state_of(base)
    for part in ("modules", "training", "hooks", "adapters"):
        assert after[part] == before[part]


@pytest.mark.parametrize("name", ["default", "seven"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_weights_come_back_to_the_bit(tmp_path, name, low_memory):
    model = random_peft_model()
    model.save_pretrained(tmp_path)
    keys = list(get_peft_model_state_dict(model))
    assert f"base_model.model.{LEAF}.eraser_down.weight" in keys
    loaded = PeftModel.from_pretrained(
        tiny_transformer().to(torch.float32), tmp_path, name, low_cpu_mem_usage=low_memory
    )
    assert torch.equal(velocity(loaded), velocity(model))
    assert loaded.peft_config[name].concept == "seven"
    assert not any(part.requires_grad for part in loaded.parameters())
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(velocity(loaded), velocity(model))
    assert sum(part.requires_grad for part in loaded.parameters()) == 2 * 4


def test_auto_peft_model_loads_base_and_eraser(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    base = tiny_transformer().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, eraser_config())
    model.save_pretrained(tmp_path / "eraser")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "eraser")
    assert len(eraser_layers(loaded)) == 2
    assert torch.equal(velocity(loaded), velocity(model))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [0]}, [0]),
        ({"target_modules": r"transformer_blocks\.1\.attn1\.to_out\.1"}, [1]),
        ({"target_modules": [LEAF]}, [0]),
        ({"exclude_modules": [LEAF]}, [1]),
    ],
)
def test_some_layers_only(settings, layers):
    model = get_peft_model(tiny_transformer(), eraser_config(**settings))
    assert list(eraser_layers(model)) == [f"transformer_blocks.{i}.attn1" for i in layers]
    assert model.peft_config["default"].num_layers == 2
    velocity(model)


def test_merging_is_refused_and_nothing_is_merged():
    model = random_peft_model()
    expected = velocity(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="Erasers cannot be merged"):
            merge()
    assert torch.equal(velocity(model), expected)


MISFITS = {
    "rank": ({"r": 33}, "`r` must be at most the width of the model, 32, got 33"),
    "no match": ({"target_modules": ["attn2.to_out.1"]}, "Target modules .* not found"),
    "no leaf": ({"target_modules": ["attn1"]}, "must match the ends .*'transformer_blocks.0.attn1'"),
    "a Linear": ({"target_modules": r".*\.to_out\..*"}, "got a match of .*attn1.to_out.0'"),
    "layer": ({"layers_to_transform": [0, 2]}, r"must lie between 0 and 1, got \[2\]"),
    "width": ({"in_features": 1920}, "2 layers of width 1920 .* 2 layers of width 32"),
    "depth": ({"num_layers": 30}, "30 layers of width 32 .* 2 layers of width 32"),
    "all excluded": ({"exclude_modules": r".*"}, "All modules were excluded"),
    "none excluded": ({"exclude_modules": ["nothing"]}, "no modules were excluded"),
}


@pytest.mark.parametrize("others", ["none", "lora", "eraser"])
@pytest.mark.parametrize(("settings", "message"), MISFITS.values(), ids=MISFITS)
def test_a_refused_eraser_leaves_the_model_as_it_was(settings, message, others):
    model = tiny_transformer()
    if others == "lora":
        add_random_lora(model, adapter_name="style")
    elif others == "eraser":
        add_random_eraser(model, "style")
    before, expected = state_of(model), velocity(model)
    with pytest.raises((ValueError, UserWarning), match=message):
        model.add_adapter(eraser_config(**settings), "seven")
    assert state_of(model) == before
    assert torch.equal(velocity(model), expected)
    model.add_adapter(EraserConfig(r=4), "seven")
    assert len(eraser_layers(model)) == 2


@pytest.mark.parametrize("name", ["a.b", "train", "keys"])
def test_names_that_torch_cannot_hold_are_refused(name):
    model = tiny_transformer()
    with pytest.raises(ValueError, match="`adapter_name` must have no dot"):
        inject_adapter_in_model(eraser_config(), model, name)
    assert not any(isinstance(module, EraserLayer) for module in model.modules())
    add_random_eraser(model, "seven")
    expected = velocity(model)
    with pytest.raises(ValueError, match="`adapter_name` must be new, got 'seven'"):
        inject_adapter_in_model(eraser_config(), model, "seven")
    assert torch.equal(velocity(model), expected)


def test_other_models_are_refused():
    other = tiny_auraflow_pipeline().transformer
    with pytest.raises(
        ValueError, match="must be a denoiser of .*CogVideoX or .*, got AuraFlowTransformer2DModel, which"
    ):
        other.add_adapter(EraserConfig(r=4))
    assert not other._hf_peft_config_loaded


def test_places_from_weights_are_checked_as_well():
    model = tiny_transformer()
    before = state_of(model)
    weights = {f"{LEAF}.eraser_up.weight": None}
    inject_adapter_in_model(eraser_config(layers_to_transform=0), model, state_dict=weights)
    assert list(eraser_layers(model)) == ["transformer_blocks.0.attn1"]
    model = tiny_transformer()
    weights |= {"transformer_blocks.1.attn1.to_q.eraser_up.weight": None}
    with pytest.raises(ValueError, match="got a match of 'transformer_blocks.1.attn1.to_q'"):
        inject_adapter_in_model(eraser_config(), model, state_dict=weights)
    assert state_of(model) == before


def test_a_sequentially_offloaded_model_is_refused():
    model = cpu_offload(tiny_transformer(), torch.device("cpu"))
    expected = velocity(model)
    with pytest.raises(ValueError, match="Add the eraser before `enable_sequential_cpu_offload"):
        model.add_adapter(EraserConfig(r=4), "seven")
    assert torch.equal(velocity(model), expected)


def test_the_width_is_seen_through_a_lora():
    model = tiny_transformer(num_attention_heads=3)
    add_random_lora(model)
    assert attention_width(model.transformer_blocks[0].attn1) == 48

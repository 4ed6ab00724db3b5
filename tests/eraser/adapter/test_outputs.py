from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from diffusers_ext.core.capture import capture
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import (
    eraser_layers,
    eraser_outputs,
    erasers_disabled,
    trainable_eraser_parameters,
)
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_erasers import TEXT, VIDEO, WIDTH, add_random_eraser, transformer_inputs, velocity
from tests.tiny_lora import add_random_lora

NAMES = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def eraser_model(*names: str) -> torch.nn.Module:
    model = tiny_transformer()
    for seed, name in enumerate(names):
        add_random_eraser(model, name, seed)
    model.set_adapters(list(names))
    return model


def run_and_stop(model: torch.nn.Module, context, expected: torch.Tensor) -> None:
    """Raise inside the context, after a pass that gives `expected`."""
    with context:
        assert torch.equal(velocity(model), expected)
        raise RuntimeError("stop")


def gradients(model: torch.nn.Module, reduce=None, inside: bool = False) -> list[torch.Tensor]:
    """Gradients of the summed squares of outputs and velocity; the context closes before or after."""
    with eraser_outputs(model, reduce=reduce) as outputs:
        prediction = model(**transformer_inputs())[0]
        loss = prediction.square().mean() + sum(o.square().sum() for o in outputs.values())
        if inside:
            loss.backward()
    kept = dict(outputs)
    if not inside:
        loss.backward()
    assert outputs == kept
    found = [part.grad for part in model.parameters() if part.grad is not None]
    model.zero_grad()
    return found


def test_layers_have_the_same_names_in_every_wrapper():
    model = eraser_model("a")
    assert list(eraser_layers(model)) == NAMES
    assert eraser_layers(model)[NAMES[1]] is model.transformer_blocks[1].attn1.to_out[1]
    wrapped = get_peft_model(tiny_transformer(num_layers=11), EraserConfig(r=2))
    names = [f"transformer_blocks.{i}.attn1" for i in range(11)]
    assert list(eraser_layers(wrapped)) == names
    for wrapper in ("_orig_mod", "module"):
        assert list(eraser_layers(torch.nn.ModuleDict({wrapper: model}))) == NAMES
    assert eraser_layers(tiny_transformer()) == {}


def test_disabled_erasers_leave_the_base_and_the_loras():
    model = tiny_transformer()
    add_random_lora(model, adapter_name="style")
    with_lora = velocity(model)
    add_random_eraser(model, "a")
    model.set_adapters(["style", "a"], [1.0, 0.8])
    before = velocity(model)
    trainable = [part.requires_grad for part in model.parameters()]
    with erasers_disabled(model):
        assert torch.equal(velocity(model), with_lora)
        assert [part.requires_grad for part in model.parameters()] == trainable
        with erasers_disabled(model):
            pass
        assert torch.equal(velocity(model), with_lora)
    assert torch.equal(velocity(model), before)


def test_disabled_erasers_come_back_after_an_exception_and_stay_off_if_they_were():
    model = get_peft_model(tiny_transformer(), EraserConfig(r=4, init_weights=False))
    before = velocity(model)
    with model.disable_adapter():
        base = velocity(model)
    with pytest.raises(RuntimeError, match="stop"):
        run_and_stop(model, erasers_disabled(model), base)
    assert torch.equal(velocity(model), before)
    with model.disable_adapter():
        with erasers_disabled(model):
            pass
        assert torch.equal(velocity(model), base)
    with erasers_disabled(tiny_transformer()) as nothing:
        assert nothing is None


@torch.no_grad()
def test_only_the_first_pass_is_kept():
    model = eraser_model("a")
    with eraser_outputs(model) as outputs:
        assert outputs == {}
        velocity(model)
        kept = dict(outputs)
        model(**transformer_inputs(batch=1))
    assert list(outputs) == NAMES
    assert all(outputs[name] is kept[name] for name in NAMES)
    assert all(output.shape == (2, VIDEO, WIDTH) for output in outputs.values())
    assert all(not layer.recorders for layer in eraser_layers(model).values())


@torch.no_grad()
def test_recorded_outputs_explain_the_layer():
    model = eraser_model("a", "b")
    model.set_adapters(["a", "b"], [0.5, 2.0])
    states = {}

    def keep_first(name, features):
        states.setdefault(name, features)

    with (
        capture(model, "*.0.attn1.to_out.1", keep_first),
        eraser_outputs(model) as both,
        eraser_outputs(model, "a") as first,
        eraser_outputs(model, "b", reduce=lambda name, output: output.mean()) as second,
    ):
        velocity(model)
    (video,) = (tokens[:, TEXT:] for tokens in states.values())
    layer = eraser_layers(model)[NAMES[0]]
    alone = {name: layer.erase(name, video) for name in "ab"}
    assert torch.equal(first[NAMES[0]], alone["a"])
    assert torch.equal(second[NAMES[0]], alone["b"].mean())
    assert torch.equal(both[NAMES[0]], alone["a"] + alone["b"])


def test_an_inactive_eraser_has_no_output():
    model = eraser_model("a", "b")
    model.set_adapters("b")
    with eraser_outputs(model, "a") as outputs, erasers_disabled(model):
        velocity(model)
    assert outputs == {}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reduces", [True, False])
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(reduces, inside):
    calls = []

    def root_mean_square(name, output):
        calls.append(name)
        return output.square().mean().sqrt()

    reduce = root_mean_square if reduces else None
    model = eraser_model("a", "b").train()
    expected = gradients(model, reduce, inside)
    assert calls == (NAMES if reduces else [])
    function = model._gradient_checkpointing_func
    model.enable_gradient_checkpointing()
    found = gradients(model, reduce, inside)
    assert len(found) == len(expected) == 16
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert model._gradient_checkpointing_func is not function
    assert model._gradient_checkpointing_func.__qualname__.startswith("ModelMixin")
    assert all(not layer.recorders for layer in eraser_layers(model).values())
    plain = model(**transformer_inputs())[0].square().mean()
    plain.backward()


def test_recorders_are_gone_after_an_exception():
    model = eraser_model("a")
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    reading = eraser_outputs(model, reduce=lambda name, output: output.mean())
    with pytest.raises(RuntimeError, match="stop"):
        run_and_stop(model, reading, velocity(model))
    assert model._gradient_checkpointing_func is function
    assert all(not layer.recorders for layer in eraser_layers(model).values())


def test_missing_erasers_are_named():
    with (
        pytest.raises(ValueError, match="must have an eraser, got CogVideoX.* with none"),
        eraser_outputs(tiny_transformer()),
    ):
        pass
    model = eraser_model("a", "b")
    with (
        pytest.raises(ValueError, match=r"must have the eraser 'c', got .* with \['a', 'b'\]"),
        eraser_outputs(model, "c"),
    ):
        pass
    with pytest.raises(ValueError, match="must have the eraser 'c'"):
        trainable_eraser_parameters(model, "c")


def test_trainable_parameters_are_those_of_one_eraser():
    model = eraser_model("a", "b")
    parameters = trainable_eraser_parameters(model, "b")
    named = {id(part): name for name, part in model.named_parameters()}
    names = [named[id(part)] for part in parameters]
    assert len(names) == 8
    assert all(".b." in name for name in names)
    assert names[0] == "transformer_blocks.0.attn1.to_out.1.eraser_down.b.weight"
    model.set_adapter("a")
    with pytest.raises(ValueError, match="must name a trainable eraser, got 'b', which is frozen"):
        trainable_eraser_parameters(model, "b")

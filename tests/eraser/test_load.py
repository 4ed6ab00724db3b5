"""Erasers loaded into transformers and pipelines, from PEFT's and legacy folders and the Hub."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import eraser_layers, trainable_eraser_parameters
from diffusers_ext.eraser.files import convert_eraser, load_eraser
from diffusers_ext.eraser.fit import find_transformer
from diffusers_ext.eraser.formats import read_eraser
from tests.eraser.legacy_fixture import FOLDER, outputs, reference_transformer, run_reference
from tests.eraser.saved_erasers import make_eraser, run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline
from tests.tiny_lora import add_random_lora


@pytest.fixture
def folder(tmp_path):
    return saved_eraser(tmp_path / "eraser")


@pytest.fixture
def expected():
    return run(make_eraser(tiny_transformer()))


@pytest.mark.parametrize("rotary", [False, True])
def test_a_legacy_eraser_gives_the_official_outputs(rotary):
    case = "rotary" if rotary else "absolute"
    transformer = reference_transformer(rotary)
    torch.testing.assert_close(run_reference(transformer, rotary), outputs()[f"{case}.erasers_off"], atol=2e-5, rtol=0)
    load_eraser(transformer, FOLDER)
    on = run_reference(transformer, rotary)
    torch.testing.assert_close(on, outputs()[f"{case}.erasers_on"], atol=2e-5, rtol=0)
    transformer.set_adapters("default", 0.0)
    off = run_reference(transformer, rotary)
    torch.testing.assert_close(off, outputs()[f"{case}.erasers_off"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("format", ["peft", "legacy"])
def test_a_saved_eraser_loads_to_the_bit(tmp_path, expected, format):
    transformer = tiny_transformer()
    base = run(transformer)
    keys = transformer.state_dict().keys()
    assert not torch.equal(base, expected)
    name = load_eraser(transformer, saved_eraser(tmp_path, format=format), adapter_name="eraser")
    assert name == "eraser"
    assert torch.equal(run(transformer), expected)
    assert {key for key in transformer.state_dict() if "eraser_" not in key} == keys
    transformer.unload_lora()
    assert torch.equal(run(transformer), base)
    assert transformer.state_dict().keys() == keys


def test_it_loads_into_a_pipeline_at_a_scale(folder, expected):
    pipeline = tiny_video_pipeline()
    pipeline.transformer = tiny_transformer()
    base = run(pipeline.transformer)
    load_eraser(pipeline, folder, adapter_name="seven", scale=0.0)
    assert torch.equal(run(pipeline.transformer), base)
    assert pipeline.get_active_adapters() == ["seven"]
    pipeline.set_adapters("seven", 1.0)
    assert torch.equal(run(pipeline.transformer), expected)


def test_each_eraser_keeps_its_own_scale_and_gradients(tmp_path, folder):
    other = saved_eraser(tmp_path / "other", seed=2, r=3, layers_to_transform=[1])
    transformer = tiny_transformer()
    add_random_lora(transformer, adapter_name="lora")
    flags = {name: weight.requires_grad for name, weight in transformer.named_parameters()}
    load_eraser(transformer, folder, adapter_name="one", scale=0.5)
    load_eraser(transformer, other, adapter_name="two", scale=1.3)
    layers = eraser_layers(transformer)
    assert layers["transformer_blocks.0.attn1"].scaling == {"one": 0.5}
    assert layers["transformer_blocks.1.attn1"].scaling == {"one": 0.5, "two": 1.3}
    assert transformer.active_adapters() == ["lora", "one", "two"]
    after = dict(transformer.named_parameters())
    assert {name: after[name].requires_grad for name in flags} == flags
    assert not any(after[name].requires_grad for name in after.keys() - flags.keys())


def test_a_trainable_eraser_is_all_that_trains(folder):
    transformer = tiny_transformer()
    load_eraser(transformer, folder, is_trainable=True)
    trainable = [weight for weight in transformer.parameters() if weight.requires_grad]
    parameters = trainable_eraser_parameters(transformer, "default")
    assert {id(weight) for weight in trainable} == {id(weight) for weight in parameters}
    assert len(trainable) == 8


def test_bfloat16_base_gets_a_float32_eraser(folder):
    transformer = tiny_transformer().to(torch.bfloat16)
    load_eraser(transformer, folder)
    assert {p.dtype for n, p in transformer.named_parameters() if "eraser_" in n} == {torch.float32}
    assert run(transformer, torch.bfloat16).dtype == torch.bfloat16


def test_bad_names_scales_and_models_are_refused(folder):
    transformer = make_eraser(tiny_transformer(), "one")
    with pytest.raises(ValueError, match="must not be in use, got 'one' beside"):
        load_eraser(transformer, folder, adapter_name="one")
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="must be a name without dots"):
            load_eraser(transformer, folder, adapter_name=name)
    for scale in (float("nan"), float("inf"), -0.5):
        with pytest.raises(ValueError, match=f"`scale` .* at least 0, got {scale}: a negative one"):
            load_eraser(transformer, folder, scale=scale)
    transformer.disable_adapters()
    with pytest.raises(ValueError, match="erasers must be on .* Call `enable_adapters"):
        load_eraser(transformer, folder)
    with pytest.raises(TypeError, match="must be a .*CogVideoXTransformer3DModel .* got a Linear"):
        load_eraser(torch.nn.Linear(2, 2), folder)
    peft_model = get_peft_model(tiny_transformer(), EraserConfig(r=2))
    with pytest.raises(TypeError, match="got a PeftModel. Use its own `load_adapter`"):
        load_eraser(peft_model, folder)
    assert find_transformer(peft_model) is peft_model.get_base_model()


def test_unknown_keywords_are_refused_for_a_local_folder(folder, tmp_path):
    with pytest.raises(TypeError, match="load_eraser.* argument 'typo'"):
        load_eraser(tiny_transformer(), folder, typo=1)
    with pytest.raises(TypeError, match="load_eraser.* argument 'lora_scale'"):
        load_eraser(tiny_transformer(), folder, lora_scale=0.0)
    with pytest.raises(TypeError, match="convert_eraser.* argument 'revison'.*Did you mean 'revision'"):
        convert_eraser(folder, tmp_path / "new", "peft", revison="x")
    with pytest.raises(TypeError, match="argument 'formt'"):
        read_eraser(folder, formt="x")


@pytest.mark.parametrize("format", ["peft", "legacy"])
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"num_layers": 3}, "width 32 with 3 blocks"),
        ({"num_layers": 1}, "width 32 with 1 blocks"),
        ({"num_attention_heads": 3}, "width 48 with 2 blocks"),
    ],
)
def test_an_eraser_of_another_model_leaves_the_model_alone(tmp_path, format, overrides, found):
    saved_eraser(tmp_path, format=format)
    transformer = tiny_transformer(**overrides)
    before = [name for name, _ in transformer.named_modules()]
    with pytest.raises(ValueError, match=f"{found}, got one for width 32 with 2 blocks"):
        load_eraser(transformer, tmp_path)
    assert [name for name, _ in transformer.named_modules()] == before
    assert not hasattr(transformer, "peft_config")


def test_peft_reads_it_too(folder, expected):
    model = PeftModel.from_pretrained(tiny_transformer(), folder, adapter_name="other")
    assert torch.equal(run(model), expected)
    wrong = tiny_transformer(num_attention_heads=3)
    with pytest.raises(ValueError, match="got one for 2 layers of width 32"):
        PeftModel.from_pretrained(wrong, folder)

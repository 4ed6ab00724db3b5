"""Erasers beside what users do with a CogVideoX: LoRAs, fused projections, pipelines, training."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.files import load_eraser
from tests.eraser.saved_erasers import inputs, run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline
from tests.tiny_lora import add_random_lora

LORA_AFTER = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_eraser(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return saved_eraser(tmp_path_factory.mktemp("two"), seed=2)


def with_eraser(folder, **overrides) -> CogVideoXTransformer3DModel:
    transformer = tiny_transformer(**overrides)
    load_eraser(transformer, folder)
    return transformer


def eraser_gradients(folder, checkpointing: bool) -> list[torch.Tensor]:
    transformer = tiny_transformer()
    load_eraser(transformer, folder, is_trainable=True)
    transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer(**inputs(transformer), return_dict=False)[0].square().mean().backward()
    assert {n for n, p in transformer.named_parameters() if p.grad is not None} == {
        n for n, _ in transformer.named_parameters() if "eraser_" in n
    }
    return [p.grad for p in transformer.parameters() if p.grad is not None]


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    plain, checkpointed = (eraser_gradients(folder, on) for on in (False, True))
    assert all(gradient.any() for gradient in plain)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@LORA_AFTER
def test_loras_before_and_after_give_the_same_model(folder):
    lora = tiny_transformer()
    add_random_lora(lora, adapter_name="lora")
    with_lora = run(lora)
    load_eraser(lora, folder, adapter_name="eraser")
    expected = run(lora)
    assert not torch.equal(expected, with_lora)

    after = tiny_transformer()
    load_eraser(after, folder, adapter_name="eraser")
    add_random_lora(after, adapter_name="lora")
    after.set_adapters(["lora", "eraser"])
    assert torch.equal(run(after), expected)
    assert after.state_dict().keys() == lora.state_dict().keys()

    lora.set_adapters(["lora", "eraser"], [1.0, 0.0])
    assert torch.equal(run(lora), with_lora)
    after.delete_adapters("eraser")
    assert torch.equal(run(after), with_lora)
    lora.set_adapters("eraser")
    assert torch.equal(run(lora), run(with_eraser(folder)))


def test_erasers_add_up_each_with_its_scale(folder, other):
    alone, beside = run(with_eraser(folder)), run(with_eraser(other))
    transformer = tiny_transformer()
    load_eraser(transformer, folder, adapter_name="one")
    load_eraser(transformer, other, adapter_name="two")
    both = run(transformer)
    assert not torch.equal(both, alone)
    swapped = tiny_transformer()
    load_eraser(swapped, other, adapter_name="two")
    load_eraser(swapped, folder, adapter_name="one")
    torch.testing.assert_close(run(swapped), both)
    for weights, expected in (([1.0, 0.0], alone), ([0.0, 1.0], beside)):
        transformer.set_adapters(["one", "two"], weights)
        assert torch.equal(run(transformer), expected)
    load_eraser(transformer, folder, adapter_name="three", scale=0.5)
    transformer.set_adapters(["one", "three"], [0.5, 0.5])
    torch.testing.assert_close(run(transformer), alone)
    transformer.delete_adapters(["two", "three"])
    transformer.set_adapters("one")
    assert torch.equal(run(transformer), alone)


@pytest.mark.parametrize("first", ["eraser", "fusing"])
def test_fused_projections(folder, first):
    expected = run(with_eraser(folder))
    transformer = tiny_transformer()
    if first == "fusing":
        transformer.fuse_qkv_projections()
    load_eraser(transformer, folder)
    if first == "eraser":
        transformer.fuse_qkv_projections()
    assert transformer.transformer_blocks[0].attn1.fused_projections
    torch.testing.assert_close(run(transformer), expected)
    transformer.unfuse_qkv_projections()
    assert torch.equal(run(transformer), expected)


def draw(pipeline: CogVideoXPipeline, **options) -> torch.Tensor:
    """Latents after two steps with classifier-free guidance."""
    return pipeline(
        "a red seven moving right",
        num_frames=9,
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).frames


def test_a_pipeline_runs_with_and_without_an_eraser(folder):
    pipeline = tiny_video_pipeline()
    base = draw(pipeline)
    load_eraser(pipeline, folder, adapter_name="seven")
    erased = draw(pipeline)
    assert not torch.equal(erased, base)
    assert torch.equal(draw(pipeline, attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(draw(pipeline), erased)

    with erasers_disabled(pipeline.transformer):
        assert torch.equal(draw(pipeline), base)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), base)

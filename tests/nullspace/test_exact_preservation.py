"""What the whole method promises: outputs for preserved prompts do not move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.lora import add_null_space_lora, lora_linears, save_lora
from diffusers_ext.nullspace.projector import NullSpaceProjector, ProjectedUpdate
from examples.digits.check_model import load_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline

SUBJECT = "a photo of a sks glyph"
# prompts, sub-phrases or not: few enough to leave a null space of each pipeline's text width
PRESERVED = {
    load_pipeline: (["a photo of the red digit seven", "a blue one"], False),
    random_digits_pipeline: (["seven red"], True),
    sdxl_pipeline: (["a blue one"], False),
}


def predict(pipeline: DiffusionPipeline, prompt: str) -> torch.Tensor:
    """The UNet's predictions for random latents, some far from any picture, at several timesteps."""
    sdxl = hasattr(pipeline, "text_encoder_2")
    guidance = {"do_classifier_free_guidance": False}
    encoded = pipeline.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1, **guidance)
    added = None
    if sdxl:
        times = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        added = {"text_embeds": encoded[2], "time_ids": times}
    outputs = []
    for seed, timestep, scale in ((0, 999, 1.0), (1, 500, 1.0), (2, 20, 0.3), (3, 1, 5.0)):
        latents = scale * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            outputs.append(pipeline.unet(latents, timestep, encoded[0], added_cond_kwargs=added).sample)
    return torch.cat(outputs)


def assert_preserved(pipeline: DiffusionPipeline, before: dict[str, torch.Tensor]) -> None:
    for prompt, base in before.items():
        moved = (predict(pipeline, prompt) - base).flatten(1).norm(dim=1)
        change = moved / base.flatten(1).norm(dim=1)
        if prompt == SUBJECT:
            assert (change > 1e-3).all()
        else:
            assert (change < 1e-5).all()


@pytest.mark.parametrize("build", PRESERVED)
def test_preserved_prompts_do_not_move_before_and_after_saving_and_fusing(
    build: Callable[[], DiffusionPipeline], tmp_path
):
    pipeline = build()
    prompts, expand = PRESERVED[build]
    before = {prompt: predict(pipeline, prompt) for prompt in (*prompts, "", SUBJECT)}
    statistics = collect_statistics(pipeline, prompts, expand_sub_phrases=expand)
    chosen = add_null_space_lora(
        pipeline.unet,
        statistics,
        instance_prompts=[SUBJECT],
        pipeline=pipeline,
        rank=2,
        directions="null",  # of the numerical null space, as there is one
    )
    assert chosen.null_space == "numerical null space, exact in float32"
    assert chosen.report()[0]["null_space"] == chosen.null_space
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_linears(pipeline.unet):
            size = layer.get_base_layer().weight.norm() / len(layer.lora_B["default"].weight) ** 0.5
            layer.lora_B["default"].weight.normal_().mul_(size)
    assert set(chosen.sets) == {"text"}
    assert_preserved(pipeline, before)
    save_lora(type(pipeline), pipeline.unet, tmp_path)

    stock = build()
    stock.load_lora_weights(tmp_path)
    assert_preserved(stock, before)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert_preserved(stock, before)


def test_preserved_pictures_do_not_move(tmp_path):
    pipeline, prompts = load_pipeline(), ["a photo of the red digit seven", "a blue one"]
    statistics = collect_statistics(pipeline, prompts, expand_sub_phrases=False)

    def draw(prompt: str) -> torch.Tensor:
        return pipeline(
            prompt, num_inference_steps=5, guidance_scale=7.5, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    before = {prompt: draw(prompt) for prompt in (*prompts, SUBJECT)}
    add_null_space_lora(
        pipeline.unet, statistics, instance_prompts=[SUBJECT], pipeline=pipeline,
        directions="null", projector=NullSpaceProjector.from_statistics(statistics, energy=0),
    )  # fmt: skip
    torch.manual_seed(1)
    for _, layer in lora_linears(pipeline.unet):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    drift = {prompt: (draw(prompt) - picture).abs().mean() for prompt, picture in before.items()}
    assert drift.pop(SUBJECT) > 0.01
    assert max(drift.values()) < 1e-4


def test_whole_weights_trained_under_the_projection_keep_preserved_prompts():
    pipeline, prompts = load_pipeline(), ["a photo of the red digit seven", "a blue one"]
    before = {prompt: predict(pipeline, prompt) for prompt in (*prompts, "", SUBJECT)}
    statistics = collect_statistics(pipeline, prompts, expand_sub_phrases=False)
    projector = NullSpaceProjector.from_statistics(statistics, energy=0)
    pipeline.unet.requires_grad_(False)
    weights = {
        pipeline.unet.get_submodule(name).weight.requires_grad_(True): projection
        for name, projection in projector.projections().items()
    }
    optimizer = torch.optim.Adam(list(weights), lr=1e-2)
    text = pipeline.encode_prompt(SUBJECT, "cpu", 1, False)[0].detach()
    generator = torch.Generator().manual_seed(0)
    with ProjectedUpdate(optimizer, weights):
        for _ in range(10):
            latents, target = torch.randn(2, 1, 4, 8, 8, generator=generator)
            loss = (pipeline.unet(latents, 500, text).sample - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_preserved(pipeline, before)

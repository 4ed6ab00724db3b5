"""A base model is one file and one entry of the list: all tools run on a made-up one."""

from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowPipeline

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.adapter.model import register_eraser
from diffusers_ext.eraser.files import load_eraser, save_eraser
from diffusers_ext.eraser.losses import NegativelyGuidedVelocityLoss
from diffusers_ext.eraser.teacher.collect import teacher_velocities
from diffusers_ext.families import FAMILIES, find_family, match_family
from diffusers_ext.families.sd3 import SD3
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_text
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.directions import null_space_directions
from tests.families.made_up_family import MadeUp, MadeUpPipeline, clip_of_noise, made_up_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline

PROMPTS = ["a red seven", "a blue three"]


@pytest.fixture(autouse=True)
def _known():
    FAMILIES.append(MadeUp())
    yield
    FAMILIES.pop()


def test_the_nearest_class_tells_the_family():
    pipeline = made_up_pipeline()
    for model in (pipeline, pipeline.transformer, MadeUpPipeline, "MadeUpPipeline"):
        assert find_family(model).name == "made_up"
    assert isinstance(find_family(tiny_sd3_pipeline()), SD3)
    assert isinstance(match_family(pipeline, "eraser"), MadeUp)
    assert match_family(AuraFlowPipeline, "eraser") is None
    with pytest.raises(ValueError, match="one of .*CogVideoXPipeline, MadeUpPipeline or derived fr"):
        find_family(AuraFlowPipeline, "eraser")


def test_null_space_counts_its_features_and_chooses_directions():
    run = {
        "features": ("q", "v"),
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 32,
        "show_progress": False,
    }
    pipeline = made_up_pipeline()
    known = collect_statistics(pipeline, PROMPTS, **run)
    new = collect_statistics(
        pipeline, ["a green nine"], expand_sub_phrases=False, include_guidance_prompts=False, **run
    )
    assert set(known.sources) == {f"transformer_blocks.{block}.attn.to_{name}" for block in range(2) for name in "qv"}
    directions = null_space_directions(known, new, rank=1, eps=1e-6)
    assert directions.vectors("transformer_blocks.1.attn.to_v").shape == (1, 16)


def test_its_noise_is_redenoised():
    pipeline, plain = made_up_pipeline(), tiny_sd3_pipeline()
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = (redenoise_text(each, noise, encode_prompts(each, PROMPTS)) for each in (pipeline, plain))
    assert torch.equal(found, expected)
    assert (found - noise).norm() > 1e-3 * noise.norm()


def test_an_eraser_attaches_trains_and_is_loaded_again(tmp_path):
    register_eraser()
    pipeline = made_up_pipeline()
    velocity = find_family(pipeline, "eraser").velocity(pipeline, 1, 32, 32)
    text = encode_prompts(pipeline, PROMPTS)
    rows = (clip_of_noise(pipeline, 2), torch.tensor([900, 300]), text.prompt_embeds)
    before = velocity(*rows).detach()
    pipeline.transformer.add_adapter(EraserConfig(r=4, init_weights=False))
    layers = [m for m in pipeline.transformer.modules() if isinstance(m, EraserLayer)]
    assert len(layers) == 2
    erased = velocity(*rows)
    assert not torch.equal(erased, before)
    assert torch.equal(teacher_velocities(velocity, velocity, [rows])[0], before)
    loss, _ = NegativelyGuidedVelocityLoss()(velocity, velocity, *rows, text.negative_prompt_embeds)
    loss.backward()
    assert layers[0].eraser_up["default"].weight.grad.any()
    save_eraser(pipeline, tmp_path, concept="seven")
    other = made_up_pipeline()
    load_eraser(other, tmp_path)
    found = find_family(other, "eraser").velocity(other, 1, 32, 32)(*rows)
    assert torch.equal(found, erased)

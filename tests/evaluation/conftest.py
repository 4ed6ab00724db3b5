"""A small random Stable Diffusion for 32x32 pictures, with and without a LoRA that shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from examples.digits.prompts import make_tokenizer
from examples.digits.train_model import build_scheduler, build_text_encoder


def make_pipeline(scheduler: DDIMScheduler | None = None) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae,
        build_text_encoder(tokenizer),
        tokenizer,
        unet,
        scheduler or build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for model in (vae, unet, pipeline.text_encoder):
        model.eval()
    pipeline.set_progress_bar_config(desc="mine", disable=True)
    return pipeline


def add_lora(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    torch.manual_seed(1)
    targets = ["attn2.to_k", "attn2.to_v"]
    config = LoraConfig(r=2, lora_alpha=40, target_modules=targets, init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="subject")
    return pipeline


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return make_pipeline()


@pytest.fixture
def tuned() -> StableDiffusionPipeline:
    return add_lora(make_pipeline())


@pytest.fixture
def picture(tuned) -> Callable[[], torch.Tensor]:
    """What the user's own call of `tuned` draws."""

    def draw() -> torch.Tensor:
        return tuned(
            "a red seven", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt"
        ).images

    return draw

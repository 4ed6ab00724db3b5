"""Hunyuan-DiT, SD3 and Flux pipelines that start from noise which suits the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, HunyuanDiTPipeline, StableDiffusion3Pipeline

from diffusers_ext.golden_noise.pipeline_mixin import GoldenNoiseMixin, NetworkSizes


class GoldenNoiseHunyuanDiTPipeline(GoldenNoiseMixin, HunyuanDiTPipeline):
    """`HunyuanDiTPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the first encoder's (BERT) text with its mask.
    """

    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "attention_mask": 2}

    def _network_text(
        self, encoded: tuple[torch.Tensor | None, ...], arguments: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        text = super()._network_text(encoded, arguments)
        images, mask = arguments["num_images_per_prompt"], text["attention_mask"]
        prompts = len(text["prompt_embeds"]) // images
        # The embeddings repeat image by image; diffusers repeats the masks of its own prompts as a
        # whole, and given ones not at all.
        if arguments["prompt"] is not None or len(mask) == prompts:
            text["attention_mask"] = mask[:prompts].repeat_interleave(images, 0)
        return text

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(config.in_channels, config.cross_attention_dim)


class GoldenNoiseSD3Pipeline(GoldenNoiseMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with an optional `noise_model`; see `GoldenNoiseMixin`."""

    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def _golden_latents(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self._refine(latents.float()).to(latents.dtype)

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(
            config.in_channels, config.joint_attention_dim, config.pooled_projection_dim
        )


class GoldenNoiseFluxPipeline(GoldenNoiseMixin, FluxPipeline):
    """`FluxPipeline` with an optional `noise_model`; see `GoldenNoiseMixin`.

    The network reads the T5 text and sees the latents unpacked.
    """

    _text_outputs: ClassVar[dict[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}

    def _golden_latents(
        self, latents: tuple[torch.Tensor, torch.Tensor], height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, image_ids = latents
        noise = self._unpack_latents(packed, height, width, self.vae_scale_factor)
        golden = self._refine(noise.float())
        return self._pack_latents(golden, *golden.shape).to(packed.dtype), image_ids

    def _sizes(self) -> NetworkSizes | None:
        if self.transformer is None:
            return None
        config = self.transformer.config
        return NetworkSizes(
            config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim
        )

"""Qwen-Image: flow matching over packed latents of a video VAE, with the text of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.flux import PackedLatents
from diffusers_ext.families.published import QWEN25_VL_7B, Published
from diffusers_ext.families.text_conditioning import TextConditioning, with_negatives

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline


class QwenImage(PackedLatents):
    """Qwen-Image; a text is as long as its prompt."""

    name = "qwen_image"
    title = "Qwen-Image"
    pipelines = ("QwenImagePipeline",)
    modular_blocks = ("QwenImageAutoBlocks",)
    denoiser_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    video_vae = True
    tools = frozenset({"nullspace", "golden_noise"})
    golden_pipeline = "GoldenNoiseQwenImagePipeline"
    nullspace_pipeline = "NullSpaceDreamBoothQwenImagePipeline"
    text_fields = ("prompt_embeds", "attention_mask")
    text_outputs = {"prompt_embeds": 0, "attention_mask": 1}
    pads_text = False
    published = (
        Published(
            "Qwen/Qwen-Image",
            "Qwen-Image",
            {
                "vae": ("AutoencoderKLQwenImage", {}),
                "text_encoder": QWEN25_VL_7B,
                "transformer": ("QwenImageTransformer2DModel", {}),
            },
            torch.bfloat16,
        ),
    )
    smallest_call = {"guidance_scale": None}  # which only a distilled model takes

    def encode(self, pipeline: QwenImagePipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        """The pipeline is not guided without a negative prompt; the empty one stands for it."""
        texts = []
        for of in (prompts, negatives or [""] * len(prompts)):
            texts.append(TextConditioning(**self.network_text(pipeline.encode_prompt(prompt=of), {})))
        return with_negatives(*texts)

    def network_text(
        self, encoded: tuple[torch.Tensor | None, ...], arguments: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The pipeline has no mask where it would hide nothing."""
        (embeds, mask), given = encoded, arguments.get("prompt_embeds_mask")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        elif arguments.get("num_images_per_prompt", 1) > 1:
            # diffusers repeats masks in another order than texts, whose padding is zeros where it made them.
            images = arguments["num_images_per_prompt"]
            mask = embeds.any(-1).long() if given is None else given[:, : mask.shape[1]].repeat_interleave(images, 0)
        return {"prompt_embeds": embeds, "attention_mask": mask}

    def modular_text(self, state: Any) -> dict[str, torch.Tensor]:
        repeated = {"num_images_per_prompt": state.get("num_images_per_prompt") or 1}
        return self.network_text((state.get("prompt_embeds"), state.get("prompt_embeds_mask")), repeated)

    def token_ids(self, pipeline: QwenImagePipeline, prompt: str) -> list[list[int]]:
        """The beginning of the template is dropped."""
        ids = pipeline.tokenizer(pipeline.prompt_template_encode.format(prompt), truncation=True).input_ids
        return [ids[pipeline.prompt_template_encode_start_idx :]]

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        """Masks have names of their own."""
        return {name.replace("attention_mask", "prompt_embeds_mask"): x for name, x in text.tensors().items()}

    def embedded_guidance(self, config: Any) -> bool:
        return bool(config.guidance_embeds)

    def predict(
        self,
        pipeline: QwenImagePipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        batch, _, height, width = latents.shape
        mask, length = text.attention_mask, text.prompt_embeds.shape[1]
        if mask is not None:
            length = int(mask.sum(1).max())
            mask = None if mask[:, :length].all() else mask[:, :length]
        prediction = pipeline.transformer(
            hidden_states=self.pack(pipeline, latents),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=self.guidance_input(pipeline.transformer.config, latents, guidance_scale),
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=text.prompt_embeds[:, :length],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.unpack_like(pipeline, prediction, latents)

    def guidance_arguments(self, config: Any, guidance_scale: float) -> dict[str, Any]:
        """Without a negative prompt the pipeline is not guided."""
        if self.embedded_guidance(config):
            return {"guidance_scale": guidance_scale}
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

"""Hunyuan-DiT: a transformer with cross-attention to BERT's and T5's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family, TextConditioning
from diffusers_ext.families.published import BERT_L, MT5_XL, SDXL_VAE, Published

if TYPE_CHECKING:
    from diffusers import HunyuanDiTPipeline


_HUNYUAN_DIT = {
    "hidden_size": 1408,
    "in_channels": 4,
    "mlp_ratio": 4.3637,
    "num_layers": 40,
    "patch_size": 2,
    "sample_size": 128,
}


class HunyuanDiT(Family):
    """Hunyuan-DiT, any version."""

    name = "hunyuan_dit"
    title = "Hunyuan-DiT"
    pipelines = ("HunyuanDiTPipeline",)
    tools = frozenset({"golden_noise"})
    golden_pipeline = "GoldenNoiseHunyuanDiTPipeline"
    denoiser_class = "HunyuanDiT2DModel"
    comfyui_names = None  # where keys and values are one Linear
    text_fields = ("prompt_embeds", "attention_mask", "prompt_embeds_2", "attention_mask_2")
    text_outputs = {"prompt_embeds": 0, "attention_mask": 2}
    # Bins are sizes for pixels; given latents have their size already.
    call_arguments = {"use_resolution_binning": False}
    rounds_size = True
    published = (
        Published(
            "Tencent-Hunyuan/HunyuanDiT-Diffusers",
            "Hunyuan-DiT",
            {
                "vae": SDXL_VAE,
                "text_encoder": BERT_L,
                "transformer": ("HunyuanDiT2DModel", _HUNYUAN_DIT),
                "text_encoder_2": MT5_XL,
            },
            torch.float32,
        ),
    )

    def encode(
        self, pipeline: HunyuanDiTPipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        bert, t5 = (
            pipeline.encode_prompt(
                prompt=prompts,
                device=pipeline._execution_device,
                dtype=pipeline.transformer.dtype,
                negative_prompt=negatives,
                text_encoder_index=index,
            )
            for index in range(2)
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "attention_mask", "negative_attention_mask")
        return TextConditioning(**dict(zip(names, bert)), **{f"{name}_2": tensor for name, tensor in zip(names, t5)})

    def text_shapes(self, config: Any) -> dict[str, tuple[int | None, ...]]:
        return {
            "prompt_embeds": (config.text_len, config.cross_attention_dim),
            "prompt_embeds_2": (config.text_len_t5, config.cross_attention_dim_t5),
        }

    def network_text(
        self, encoded: tuple[torch.Tensor | None, ...], arguments: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """The first encoder's (BERT) text with its mask."""
        text = super().network_text(encoded, arguments)
        images, mask = arguments["num_images_per_prompt"], text["attention_mask"]
        prompts = len(text["prompt_embeds"]) // images
        # The embeddings repeat image by image; diffusers repeats the masks of its own prompts as a
        # whole, and given ones not at all.
        if arguments["prompt"] is not None or len(mask) == prompts:
            text["attention_mask"] = mask[:prompts].repeat_interleave(images, 0)
        return text

    def predict(
        self,
        pipeline: HunyuanDiTPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        """What the model learned of the variance is left out."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        transformer, device = pipeline.transformer, latents.device
        patch = transformer.config.patch_size
        grid = tuple(length // patch for length in latents.shape[2:])
        rotary = get_2d_rotary_pos_embed(
            transformer.inner_dim // transformer.num_heads,
            get_resize_crop_region_for_grid(grid, 512 // 8 // patch),
            grid,
            device=device,
            output_type="pt",
        )
        pixels = [pipeline.vae_scale_factor * length for length in latents.shape[2:]]
        # The pipeline's default original size, the target size, and no crop.
        sizes = torch.tensor([[1024, 1024, *pixels, 0, 0]], dtype=latents.dtype, device=device)
        prediction = transformer(
            latents,
            timestep.expand(len(latents)).to(latents.dtype),
            encoder_hidden_states=text.prompt_embeds,
            text_embedding_mask=text.attention_mask,
            encoder_hidden_states_t5=text.prompt_embeds_2,
            text_embedding_mask_t5=text.attention_mask_2,
            image_meta_size=sizes.repeat(len(latents), 1),
            style=torch.zeros(len(latents), dtype=torch.long, device=device),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

"""How the denoiser of each family is called: once, without guidance, as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, FluxPipeline, HunyuanDiTPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from diffusers_ext.golden_noise.conditioning import TextConditioning
from diffusers_ext.golden_noise.families import has_embedded_guidance, pipeline_family


def call_unet(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """Stable Diffusion and SDXL; the latter's sizes are the image's own, without a crop."""
    conditions: dict[str, torch.Tensor] = {}
    if has_embedded_guidance(pipeline):
        scales = torch.full((len(latents),), guidance_scale - 1.0)
        conditions["timestep_cond"] = pipeline.get_guidance_scale_embedding(
            scales, embedding_dim=pipeline.unet.config.time_cond_proj_dim
        ).to(latents)
    if pipeline_family(pipeline) == "sdxl":
        size = tuple(pipeline.vae_scale_factor * length for length in latents.shape[2:])
        ids = pipeline._get_add_time_ids(
            size, (0, 0), size, latents.dtype, text.pooled_prompt_embeds.shape[-1]
        )
        conditions["added_cond_kwargs"] = {
            "text_embeds": text.pooled_prompt_embeds,
            "time_ids": ids.to(latents.device).repeat(len(latents), 1),
        }
    return pipeline.unet(
        latents,
        timestep,
        encoder_hidden_states=text.prompt_embeds,
        return_dict=False,
        **conditions,
    )[0]


def call_hunyuan_dit(
    pipeline: HunyuanDiTPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """Hunyuan-DiT, any version; what it learned of the variance is left out."""
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


def call_sd3(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """Stable Diffusion 3."""
    return pipeline.transformer(
        hidden_states=latents,
        timestep=timestep.expand(len(latents)),
        encoder_hidden_states=text.prompt_embeds,
        pooled_projections=text.pooled_prompt_embeds,
        return_dict=False,
    )[0]


def call_flux(
    pipeline: FluxPipeline,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """Flux, with latents that are packed for it and unpacked again."""
    batch, channels, height, width = latents.shape
    guidance = None
    if has_embedded_guidance(pipeline):
        guidance = torch.full((batch,), guidance_scale, device=latents.device)
    prediction = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latents, batch, channels, height, width),
        timestep=timestep.expand(batch).to(latents.dtype) / 1000,
        guidance=guidance,
        pooled_projections=text.pooled_prompt_embeds,
        encoder_hidden_states=text.prompt_embeds,
        txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3).to(latents),
        img_ids=pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, latents.device, latents.dtype
        ),
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(prediction, height * factor, width * factor, factor)


DENOISER_CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "sd": call_unet,
    "sdxl": call_unet,
    "hunyuan_dit": call_hunyuan_dit,
    "sd3": call_sd3,
    "flux": call_flux,
}

"""FLUX.2, klein and dev: flow matching over patched latents, with the text of three layers of Qwen3 or Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from diffusers_ext.families.family import Family, TextConditioning
from diffusers_ext.families.picture_velocity import PictureFamily
from diffusers_ext.families.published import FLUX2_VAE, MISTRAL_24B, QWEN3_4B, QWEN3_8B, Component, Published
from diffusers_ext.families.text_conditioning import refuse_negative_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline

_LONGEST = 512  # that the pipeline's call reads by default


def _klein(num_layers: int, num_single_layers: int, num_heads: int, encoder: Component) -> dict[str, Component]:
    transformer = {
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_attention_heads": num_heads,
        "joint_attention_dim": 3 * encoder[1]["hidden_size"],
        "guidance_embeds": False,
    }
    return {"vae": FLUX2_VAE, "text_encoder": encoder, "transformer": ("Flux2Transformer2DModel", transformer)}


class Flux2(PictureFamily):
    """FLUX.2 klein, base and distilled.

    Its latents are patched: 2 x 2 of the VAE's are one of four times the channels, normalised by the batch statistics
    that the VAE carries. One of them is one token. Its LoRAs have the prefix `transformer` in diffusers.
    """

    name = "flux2"
    title = "FLUX.2"
    pipelines = ("Flux2KleinPipeline",)
    modular_blocks = ("Flux2KleinAutoBlocks", "Flux2KleinBaseAutoBlocks")
    denoiser_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    tools = frozenset({"nullspace", "golden_noise", "eraser"})
    golden_pipeline = "GoldenNoiseFlux2KleinPipeline"
    nullspace_pipeline = "NullSpaceDreamBoothFlux2KleinPipeline"
    flow_matching = True
    # Single blocks have one Linear for queries, keys, values and what their feed-forward reads.
    attention_linears = (*Family.attention_linears, "to_qkv_mlp_proj", "to_out")
    joint_attention, joint_blocks = "attn", ("Flux2TransformerBlock",)
    rounds_size = True
    deepest_layer: ClassVar[int] = 27  # of its text encoder, that the pipeline's call reads by default
    published = (
        Published(
            "black-forest-labs/FLUX.2-klein-base-4B", "FLUX.2-klein-4B", _klein(5, 20, 24, QWEN3_4B), torch.bfloat16
        ),
        Published(
            "black-forest-labs/FLUX.2-klein-base-9B", "FLUX.2-klein-9B", _klein(8, 24, 32, QWEN3_8B), torch.bfloat16
        ),
    )

    def encode(
        self, pipeline: Flux2KleinPipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        call = self.text_call(pipeline)
        embeds, negative = (
            pipeline.encode_prompt(prompt=texts, **call)[0] for texts in (prompts, negatives or [""] * len(prompts))
        )
        return TextConditioning(embeds, negative)

    def text_call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Length and layers of a text encoder that knows fewer than the 512 tokens and the layers that the call reads.

        Layers end equal parts of it, as many as the transformer reads side by side.
        """
        # Mistral's has a vision model beside its text's, and its tokenizer may be within a processor.
        tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
        encoder, longest = pipeline.text_encoder.config.get_text_config(), tokenizer.model_max_length
        call: dict[str, Any] = {} if longest >= _LONGEST else {"max_sequence_length": longest}
        if encoder.num_hidden_layers < self.deepest_layer:
            parts = self.text_width(pipeline.transformer.config) // encoder.hidden_size
            ends = (encoder.num_hidden_layers * (part + 1) // parts for part in range(parts))
            call["text_encoder_out_layers"] = tuple(ends)
        return call

    def token_ids(self, pipeline: DiffusionPipeline, prompt: str) -> list[list[int]]:
        """Of the prompt as a user's message."""
        text = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return [pipeline.tokenizer(text, truncation=True).input_ids]

    def text_length(self, config: Any) -> int:
        return _LONGEST

    def text_width(self, config: Any) -> int:
        return config.joint_attention_dim

    def patch(self, config: Any) -> int:
        """Latents are patched already."""
        return 1

    def sample_size(self, config: Any) -> int:
        """The config says nothing of it; 1024 pixels."""
        return 64

    def pixels_per_latent(self, pipeline: DiffusionPipeline) -> int:
        return 2 * pipeline.vae_scale_factor

    def pixels_per_side(self, vae_config: Any) -> int:
        """Of a patched latent."""
        return 2 * super().pixels_per_side(vae_config)

    def latent_scale(self, vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the statistics that the VAE carries, for patched latents."""
        mean, var = (x.float().view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (var + vae.config.batch_norm_eps).rsqrt()

    def from_vae(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """2 x 2 latent pixels as one of four times the channels."""
        return functional.pixel_unshuffle(latents, 2)

    def to_vae(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        return functional.pixel_shuffle(latents, 2)

    def unpack(self, pipeline: DiffusionPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The call takes them as they are, its `prepare_latents` makes tokens of them."""
        if latents.ndim == 4:
            return latents
        side = self.pixels_per_latent(pipeline)
        return latents.transpose(1, 2).unflatten(2, (int(height) // side, int(width) // side))

    def drawn(self, pipeline: Flux2KleinPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The pipeline returns latents of the VAE."""
        offset, factor = self.latent_scale(pipeline.vae)
        return (self.from_vae(pipeline, latents.float()) - offset) * factor

    def embedded_guidance(self, config: Any) -> bool:
        return bool(config.guidance_embeds)

    def predict(
        self,
        pipeline: Flux2KleinPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        batch, device = len(latents), latents.device
        guidance = None
        if self.embedded_guidance(pipeline.transformer.config):
            guidance = torch.full((batch,), guidance_scale, device=device)
        prediction = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text.prompt_embeds,
            txt_ids=pipeline._prepare_text_ids(text.prompt_embeds).to(device),
            img_ids=pipeline._prepare_latent_ids(latents).to(device),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).reshape(latents.shape)

    def grid_arguments(self, config: Any, num_steps: int, image_tokens: int) -> dict[str, Any]:
        """Levels and shift are the pipeline's own."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        sigmas = [1 - i / num_steps for i in range(num_steps)]
        return {"mu": compute_empirical_mu(image_tokens, num_steps), "sigmas": sigmas}


class Flux2Dev(Flux2):
    """FLUX.2 dev: told the guidance scale, with Mistral's text behind a system's message."""

    name = "flux2_dev"
    title = "FLUX.2 dev"
    pipelines = ("Flux2Pipeline",)
    modular_blocks = ("Flux2AutoBlocks",)
    tools = frozenset({"golden_noise"})
    golden_pipeline = "GoldenNoiseFlux2Pipeline"
    nullspace_pipeline = None
    joint_attention, joint_blocks = None, ()
    deepest_layer = 30
    published = (
        Published(
            "black-forest-labs/FLUX.2-dev",
            "FLUX.2-dev",
            {"vae": FLUX2_VAE, "text_encoder": MISTRAL_24B, "transformer": ("Flux2Transformer2DModel", {})},
            torch.bfloat16,
        ),
    )

    def encode(self, pipeline: Flux2Pipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        refuse_negative_prompts(negatives)
        return TextConditioning(pipeline.encode_prompt(prompt=prompts, **self.text_call(pipeline))[0])

    def embedded_guidance(self, config: Any) -> bool:
        """Its call takes no second prompt, whatever the config says."""
        return True

"""AuraFlow, of which Pony v7 is a finetune: flow matching with joint attention to the tokens of UMT5."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.families.family import Family
from diffusers_ext.families.text_conditioning import TextConditioning

if TYPE_CHECKING:
    from diffusers import AuraFlowPipeline


class AuraFlow(Family):
    """AuraFlow; the denoiser reads zeros in place of padding, and no mask."""

    name = "auraflow"
    title = "AuraFlow"
    pipelines = ("AuraFlowPipeline",)
    denoiser_class = "AuraFlowTransformer2DModel"
    tools = frozenset({"nullspace"})
    nullspace_pipeline = "NullSpaceDreamBoothAuraFlowPipeline"
    flow_matching = True
    blocks = "joint_transformer_blocks"

    def encode(self, pipeline: AuraFlowPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, _, negative, _ = pipeline.encode_prompt(prompt=prompts, negative_prompt=negatives)
        return TextConditioning(embeds, negative)

    def text_width(self, config: Any) -> int:
        return config.joint_attention_dim

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        """With the masks that the pipeline asks for, and applies to prompts that it encodes itself."""
        found = super().text_arguments(text)
        masks = {name.replace("embeds", "attention_mask"): x.any(-1).long() for name, x in found.items()}
        return {**found, **masks}

    def sample_size(self, config: Any) -> int:
        """The pipeline's 1024 pixels, whatever the config says."""
        return 128

    def longest_side(self, config: Any) -> int:
        """The config counts the positions of a whole square; past its rim diffusers reads those of other rows."""
        return math.isqrt(config.pos_embed_max_size)

    def predict(
        self,
        pipeline: AuraFlowPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        return pipeline.transformer(
            latents,
            encoder_hidden_states=text.prompt_embeds,
            timestep=(timestep / 1000).expand(len(latents)).to(latents.dtype),
            return_dict=False,
        )[0]

    def grid_arguments(self, config: Any, num_steps: int, image_tokens: int) -> dict[str, Any]:
        """The pipeline gives a number of steps alone."""
        return {}

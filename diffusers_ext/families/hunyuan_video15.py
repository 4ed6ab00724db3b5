"""HunyuanVideo 1.5: clips of Qwen2.5-VL's tokens and of the spelling of quoted words, guided by an object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.core.restored_state import held_attribute
from diffusers_ext.core.seeds import check_flow_levels
from diffusers_ext.families.family import Family
from diffusers_ext.families.hunyuan_video import HunyuanVideo, HunyuanVideoVelocity
from diffusers_ext.families.text_conditioning import TextConditioning, with_negatives

if TYPE_CHECKING:
    from diffusers import HunyuanVideo15Pipeline

# What the pipeline asks of its text encoder, and where its guider guides.
_TOKENS, _PICTURE_TOKENS, _ASPECT = 1000, 729, (9, 16)
_WHOLE = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo 1.5, text to video.

    Its text is Qwen2.5-VL's tokens and byT5's of what stands in quotes, both masked; a picture's tokens and latents
    are zeros where it draws from text alone. All blocks have a stream each. The scale is no argument of the call: it
    is that of the pipeline's guider, which is `ClassifierFreeGuidance`.
    """

    name = "hunyuan_video15"
    title = "HunyuanVideo 1.5"
    pipelines = ("HunyuanVideo15Pipeline",)
    denoiser_class = "HunyuanVideo15Transformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo15"
    text_fields = ("prompt_embeds", "attention_mask", "prompt_embeds_2", "attention_mask_2")
    text_outputs = {"prompt_embeds": 0, "attention_mask": 1, "prompt_embeds_2": 2, "attention_mask_2": 3}
    read_by_constructor = ("vae",)
    reports_steps = False
    joint_blocks = ("HunyuanVideo15TransformerBlock",)
    published = ()

    def encode(
        self, pipeline: HunyuanVideo15Pipeline, prompts: list[str], negatives: list[str] | None
    ) -> TextConditioning:
        return with_negatives(_encoded(pipeline, prompts), _encoded(pipeline, negatives or [""] * len(prompts)))

    def encode_clip_prompts(self, pipeline: HunyuanVideo15Pipeline, prompts: list[str]) -> TextConditioning:
        """The guider is looked at here, before the transformer is loaded."""
        check_guider(pipeline)
        return _encoded(pipeline, prompts)

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        return {name.replace("attention_mask", "prompt_embeds_mask"): x for name, x in text.tensors().items()}

    def text_length(self, config: Any) -> int:
        return _TOKENS

    def prompt_length(self, pipeline: HunyuanVideo15Pipeline) -> int:
        return pipeline.tokenizer_max_length

    def pooled_width(self, config: Any) -> None:
        return None

    def embedded_guidance(self, config: Any) -> bool:
        return False

    def guidance_arguments(self, config: Any, guidance_scale: float) -> dict[str, Any]:
        """None: see `guided_call`."""
        return {}

    @contextmanager
    def guided_call(self, pipeline: HunyuanVideo15Pipeline, guidance_scale: float) -> Iterator[dict[str, Any]]:
        check_guider(pipeline)
        with held_attribute(pipeline.guider, "guidance_scale", guidance_scale):
            yield {}

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        """What the pipeline's call draws by default: so many pixels in the shape of a screen."""
        from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=vae_config.spatial_compression_ratio)
        return 121, *processor.calculate_default_height_width(*_ASPECT, config.target_size)

    def clip_arguments(
        self, text: TextConditioning, empty: TextConditioning, latents: torch.Tensor | None = None
    ) -> dict[str, Any]:
        return Family.clip_arguments(self, text, empty, None if latents is None else latents.transpose(1, 2))

    def velocity(
        self, pipeline: HunyuanVideo15Pipeline, num_frames: int, height: int, width: int
    ) -> HunyuanVideo15Velocity:
        check_flow_levels(pipeline.scheduler, "pipeline.scheduler")
        check_guider(pipeline)
        self.latent_shape(pipeline.transformer.config, pipeline.vae.config, num_frames, height, width)
        return HunyuanVideo15Velocity(pipeline.transformer, pipeline.vision_num_semantic_tokens)

    empty_velocity = Family.empty_velocity  # it sorts tokens by what masks hold, which shapes do not tell


def check_guider(pipeline: HunyuanVideo15Pipeline) -> None:
    """Raise `ValueError` unless the pipeline's guider is classifier-free guidance at every step, and nothing else."""
    guider = pipeline.guider
    found = {name: guider.config.get(name) for name in _WHOLE}
    if type(guider).__name__ != "ClassifierFreeGuidance" or found != _WHOLE or not guider.get_state()["enabled"]:
        raise ValueError(
            "`pipeline.guider` must be an enabled ClassifierFreeGuidance of all steps without rescaling, got a "
            f"{type(guider).__name__} with {found}. Set `pipe.guider = ClassifierFreeGuidance(guidance_scale=6.0)`."
        )


class HunyuanVideo15Velocity(HunyuanVideoVelocity):
    """The velocity `noise - x_0` that HunyuanVideo 1.5 predicts from text at `x_t = (1 - sigma) x_0 + sigma noise`.

    Args:
        transformer: `HunyuanVideo15Transformer3DModel`, as `Velocity` takes it.
        picture_tokens: of no picture, which the pipeline hands it.
    """

    latents_dtype = None
    text_fields, text_rule = HunyuanVideo15.text_fields, "two texts and their masks"

    def __init__(self, transformer: torch.nn.Module, picture_tokens: int = _PICTURE_TOKENS) -> None:
        super(HunyuanVideoVelocity, self).__init__(transformer)
        self.picture_tokens = picture_tokens

    def guidance_weight(self, guidance_scale: float) -> float:
        """The guider's, whatever the scale."""
        return guidance_scale

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: TextConditioning) -> torch.Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        self._check_inputs(x_t, t, prompt_embeds)
        dtype = get_parameter_dtype(self.transformer)
        hidden, text = x_t.transpose(1, 2).to(dtype), prompt_embeds
        no_picture = hidden.new_zeros(len(hidden), self.config["in_channels"] - hidden.shape[1], *hidden.shape[2:])
        velocity = self.transformer(
            hidden_states=torch.cat([hidden, no_picture], dim=1),
            image_embeds=hidden.new_zeros(len(hidden), self.picture_tokens, self.config["image_embed_dim"]),
            timestep=t.to(dtype),
            encoder_hidden_states=text.prompt_embeds.to(dtype),
            encoder_attention_mask=text.attention_mask.to(dtype),
            encoder_hidden_states_2=text.prompt_embeds_2.to(dtype),
            encoder_attention_mask_2=text.attention_mask_2.to(dtype),
            return_dict=False,
        )[0].transpose(1, 2)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def _encoded(pipeline: HunyuanVideo15Pipeline, prompts: list[str]) -> TextConditioning:
    embeds, mask, embeds_2, mask_2 = pipeline.encode_prompt(prompt=list(prompts), batch_size=len(prompts))
    return TextConditioning(
        embeds, attention_mask=mask.long(), prompt_embeds_2=embeds_2, attention_mask_2=mask_2.long()
    )

"""What a denoiser is told about the prompts: one object for all model families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    StableDiffusion3Pipeline,
)

from diffusers_ext.core.quiet_run import eval_mode
from diffusers_ext.golden_noise.families import has_embedded_guidance, pipeline_family


# Tensors have no truth value, so two of these are compared by identity.
@dataclass(frozen=True, eq=False)
class TextConditioning:
    """Encoded prompts of a batch; what a family does not have is `None`.

    Args:
        prompt_embeds: `(batch, tokens, dim)`.
        negative_prompt_embeds: the same shape; what guidance leads away from.
        attention_mask: `(batch, tokens)`, nonzero where a token is read (Hunyuan-DiT).
        negative_attention_mask: the same shape.
        pooled_prompt_embeds: `(batch, pooled_dim)` (SDXL, SD3, Flux).
        negative_pooled_prompt_embeds: the same shape.
        prompt_embeds_2: `(batch, tokens_2, dim_2)`, the second encoder's (Hunyuan-DiT's T5).
        negative_prompt_embeds_2: the same shape.
        attention_mask_2: `(batch, tokens_2)`.
        negative_attention_mask_2: the same shape.

    Raises:
        ValueError: tensors that are not one batch of these shapes.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    negative_attention_mask: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    prompt_embeds_2: torch.Tensor | None = None
    negative_prompt_embeds_2: torch.Tensor | None = None
    attention_mask_2: torch.Tensor | None = None
    negative_attention_mask_2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3:
            raise ValueError(
                "`prompt_embeds` must be (batch, tokens, dim), got "
                f"{tuple(self.prompt_embeds.shape)}."
            )
        for name, tensor in self.tensors().items():
            if len(tensor) != len(self):
                raise ValueError(
                    f"`{name}` must be a batch of {len(self)} like `prompt_embeds`, got "
                    f"{tuple(tensor.shape)}."
                )
            self._check_shape(name, tensor)

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        wanted_like, shape = name.removeprefix("negative_"), tensor.shape
        if name.startswith("attention_mask"):
            wanted_like = name.replace("attention_mask", "prompt_embeds")
        like = getattr(self, wanted_like)
        wanted = None if like is None else like.shape[: 2 if "mask" in name else None]
        if shape != wanted:
            raise ValueError(
                f"`{name}` must be {wanted and tuple(wanted)} like `{wanted_like}`, got "
                f"{tuple(shape)}."
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | Sequence[int] | torch.Tensor) -> TextConditioning:
        if isinstance(index, int):
            raise TypeError(
                f"`index` must be a slice or a list of indices, got {index}. Use [{index}] in a "
                "list: a conditioning is always a batch."
            )
        if not isinstance(index, (slice, torch.Tensor)):
            index = list(index)
        return TextConditioning(**{name: x[index] for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> TextConditioning:
        """The same on another device."""
        return TextConditioning(**{name: x.to(device) for name, x in self.tensors().items()})


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None = None
) -> TextConditioning:
    """Encode prompts as the pipeline's own `__call__` does, with its default lengths.

    Args:
        pipeline: Stable Diffusion, SDXL, Hunyuan-DiT, SD3 or Flux.
        prompts: one a sample.
        negative_prompt: one for all; `None` is what the pipeline takes when none is given: the
            empty prompt, zeros for an SDXL pipeline with `force_zeros_for_empty_prompt`. A model
            that takes the guidance scale as an input has no negative embeddings.

    Returns:
        On the pipeline's device, in the dtype of its text encoders.

    Raises:
        ValueError: another family, no prompt, or a negative prompt for a model without one.
    """
    family = pipeline_family(pipeline)
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"`prompts` must be a non-empty list of strings, got {prompts!r}.")
    negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
    with eval_mode(pipeline):
        return _ENCODERS[family](pipeline, list(prompts), negatives)


def _encode_clip(
    pipeline: DiffusionPipeline, prompts: list[str], negatives: list[str] | None
) -> TextConditioning:
    guided = not has_embedded_guidance(pipeline)
    if not guided:
        _refuse_negative(negatives)
    embeds, negative, *pooled = pipeline.encode_prompt(
        prompt=prompts,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negatives,
    )
    positive_pooled, negative_pooled = pooled or (None, None)
    return TextConditioning(
        embeds,
        negative if guided else None,
        pooled_prompt_embeds=positive_pooled,
        negative_pooled_prompt_embeds=negative_pooled if guided else None,
    )


def _encode_hunyuan_dit(
    pipeline: HunyuanDiTPipeline, prompts: list[str], negatives: list[str] | None
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
    return TextConditioning(
        **dict(zip(names, bert)), **{f"{name}_2": tensor for name, tensor in zip(names, t5)}
    )


def _encode_sd3(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], negatives: list[str] | None
) -> TextConditioning:
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, negative_prompt=negatives
    )
    return TextConditioning(
        embeds,
        negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def _encode_flux(
    pipeline: FluxPipeline, prompts: list[str], negatives: list[str] | None
) -> TextConditioning:
    embeds, pooled, _ = pipeline.encode_prompt(prompt=prompts)
    if has_embedded_guidance(pipeline):
        _refuse_negative(negatives)
        return TextConditioning(embeds, pooled_prompt_embeds=pooled)
    negative, negative_pooled, _ = pipeline.encode_prompt(prompt=negatives or [""] * len(prompts))
    return TextConditioning(
        embeds,
        negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def _refuse_negative(negatives: list[str] | None) -> None:
    if negatives is not None:
        raise ValueError(
            "`negative_prompt` must be None for a model that takes the guidance scale as an "
            f"input, got {negatives[0]!r}."
        )


_ENCODERS: dict[str, Callable[..., TextConditioning]] = {
    "sd": _encode_clip,
    "sdxl": _encode_clip,
    "hunyuan_dit": _encode_hunyuan_dit,
    "sd3": _encode_sd3,
    "flux": _encode_flux,
}

"""One call of a CogVideoX transformer with the positions and conditions that its pipeline gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import get_parameter_dtype
from torch.nn.parallel import DistributedDataParallel

from diffusers_ext.core.noise_schedules import check_diffusion_levels
from diffusers_ext.eraser.clip_geometry import latent_shape, token_grid


# What the image-to-video pipeline of CogVideoX 1.5 passes.
_PIPELINE_OFS = 2.0

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]


class CogVideoXVelocity:
    """The velocity `v(x_t, c, t)` that a CogVideoX transformer predicts.

    CogVideoX predicts `v = sqrt(a_t) noise - sqrt(1 - a_t) x_0` (Salimans and Ho 2022,
    arXiv 2202.00512) with `a_t` the scheduler's cumulative alpha. A transformer called without
    the rotary embedding of its clip runs in silence and predicts nonsense, so what this model
    needs is checked here, once.

    Args:
        transformer: `CogVideoXTransformer3DModel`, also as PEFT model, compiled, or wrapped for
            distributed training; called as it is, with its adapters, mode and gradients.
        image_rotary_emb: cosines and sines `(video, head_dim)` as the pipeline makes them; for
            models with rotary positions only.
        ofs: frame offset, for CogVideoX 1.5 image-to-video only; its pipeline passes 2.0.
        image_latents: `(1 or batch, frames, channels, height, width)` latents of the first frame,
            padded as `prepare_latents` of the image-to-video pipeline gives them; for
            image-to-video models only.

    Raises:
        ValueError: something that this model needs is missing, or given and not used by it.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        *,
        image_rotary_emb: RotaryEmbedding | None = None,
        ofs: float | None = None,
        image_latents: torch.Tensor | None = None,
    ) -> None:
        self.transformer = transformer
        self.image_rotary_emb = image_rotary_emb
        self.ofs = ofs
        self.image_latents = image_latents
        config = self.config
        is_image_to_video = config["in_channels"] != config["out_channels"]
        rotary = config["use_rotary_positional_embeddings"]
        _check_given("image_rotary_emb", image_rotary_emb, rotary)
        _check_given("ofs", ofs, config["ofs_embed_dim"] is not None)
        _check_given("image_latents", image_latents, is_image_to_video)

    @property
    def model(self) -> torch.nn.Module:
        """The transformer without the wrapper of distributed training."""
        wrapped = isinstance(self.transformer, DistributedDataParallel)
        return self.transformer.module if wrapped else self.transformer

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformer's config."""
        return self.model.config

    @classmethod
    def from_pipeline(
        cls,
        pipeline: DiffusionPipeline,
        num_frames: int,
        height: int,
        width: int,
        *,
        image_latents: torch.Tensor | None = None,
    ) -> CogVideoXVelocity:
        """For clips of one size, with the pipeline's own rotary embedding.

        Args:
            pipeline: a CogVideoX pipeline.
            num_frames: frames of the clip.
            height: pixels.
            width: pixels.
            image_latents: see the class.

        Raises:
            ValueError: a scheduler that does not take velocities, a clip that the model cannot
                take (see `latent_shape`), or missing image latents.
        """
        predicts = pipeline.scheduler.config.get("prediction_type")
        if predicts != "v_prediction":
            raise ValueError(
                "`pipeline` must have a scheduler of prediction_type 'v_prediction', got "
                f"{predicts!r}. CogVideoX models predict velocities."
            )
        check_diffusion_levels(pipeline.scheduler, "pipeline.scheduler")
        transformer = pipeline.transformer
        frames = latent_shape(transformer, pipeline.vae, num_frames, height, width)[0]
        rotary = None
        if transformer.config.use_rotary_positional_embeddings:
            rotary = pipeline._prepare_rotary_positional_embeddings(
                height, width, frames, pipeline._execution_device
            )
        ofs = None if transformer.config.ofs_embed_dim is None else _PIPELINE_OFS
        return cls(transformer, image_rotary_emb=rotary, ofs=ofs, image_latents=image_latents)

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Predict.

        Args:
            x_t: `(batch, frames, channels, height, width)` noisy latents; cast to the model's
                dtype.
            t: `(batch,)` timesteps on the scheduler's scale.
            prompt_embeds: `(batch, text, text_dim)`; cast to the model's dtype.

        Returns:
            Velocity, the shape of `x_t`, float32 (float64 from a float64 model).

        Raises:
            ValueError: tensors that do not fit each other, the model or its rotary embedding.
        """
        self._check_inputs(x_t, t, prompt_embeds)
        dtype = get_parameter_dtype(self.transformer)
        hidden = x_t.to(dtype)
        if self.image_latents is not None:
            image = self.image_latents.to(x_t.device, dtype).expand(len(x_t), -1, -1, -1, -1)
            hidden = torch.cat([hidden, image], dim=2)
        if self.image_rotary_emb is not None:
            cosines, sines = self.image_rotary_emb
            self.image_rotary_emb = (cosines.to(x_t.device), sines.to(x_t.device))
        velocity = self.transformer(
            hidden_states=hidden,
            encoder_hidden_states=prompt_embeds.to(dtype),
            timestep=t,
            ofs=None if self.ofs is None else hidden.new_full((1,), self.ofs),
            image_rotary_emb=self.image_rotary_emb,
            return_dict=False,
        )[0]
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def _check_inputs(
        self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> None:
        channels = self.config["out_channels"]
        if x_t.ndim != 5 or x_t.shape[2] != channels:
            raise ValueError(
                f"`x_t` must be (batch, frames, {channels}, height, width), got {tuple(x_t.shape)}."
            )
        if t.shape != x_t.shape[:1]:
            raise ValueError(
                f"`t` must be ({len(x_t)},) like the batch of `x_t`, got {tuple(t.shape)}."
            )
        width = self.config["text_embed_dim"]
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[::2] != (len(x_t), width):
            raise ValueError(
                f"`prompt_embeds` must be ({len(x_t)}, text, {width}), got "
                f"{tuple(prompt_embeds.shape)}."
            )
        image = self.image_latents
        if image is not None and tuple(image.shape) not in (x_t.shape, (1, *x_t.shape[1:])):
            raise ValueError(
                f"`image_latents` must be (1 or {len(x_t)}, ...) and otherwise like `x_t`, "
                f"{tuple(x_t.shape)}, got {tuple(image.shape)}."
            )
        grid = token_grid(self.model, x_t.shape)
        tokens = grid.frames * grid.rows * grid.columns
        if self.image_rotary_emb is not None and len(self.image_rotary_emb[0]) != tokens:
            raise ValueError(
                f"`x_t` must have {len(self.image_rotary_emb[0])} video tokens like the rotary "
                f"embedding, got {tokens} from {tuple(x_t.shape)}. Make one velocity per clip size."
            )


def _check_given(name: str, value: object, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(
            f"`{name}` must be given to this model, got None. `CogVideoXVelocity.from_pipeline` "
            "takes what the pipeline itself passes."
        )
    if not needed and value is not None:
        raise ValueError(f"`{name}` must be None for a model that does not use it, got a value.")

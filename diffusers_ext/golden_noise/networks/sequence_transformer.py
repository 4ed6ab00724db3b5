"""A transformer over the frames of a noise sequence: all patches of a frame, earlier frames, the prompt."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.golden_noise.networks.blocks import (
    KeysValues,
    ReadText,
    TextReader,
    TransformerBlock,
    patch_positions,
)
from diffusers_ext.golden_noise.networks.golden_noise_model import from_patches, to_patches
from diffusers_ext.golden_noise.networks.sequence import NoiseSequenceNetwork


class FrameMemory(NamedTuple):
    """What later frames attend to."""

    keys_values: list[KeysValues]  # one a block
    num_frames: int


def frame_causal_mask(steps: int, patches: int, device: torch.device | None = None) -> torch.Tensor:
    """Who sees whom: every patch sees all patches of its own and of earlier frames."""
    frame = torch.arange(steps, device=device).repeat_interleave(patches)
    return frame[:, None] >= frame[None, :]


class NoiseSequenceTransformer(NoiseSequenceNetwork, ModelMixin, ConfigMixin):
    """Block-causal transformer over noise patches with cross-attention to the prompt.

    The head reads a patch's hidden state and the patch itself, so white noise does not have to pass through the hidden
    width, and it starts at zero: with `predict_residual` an untrained network is the identity. Any height and width:
    positions are relative to the picture, and sides that the patch does not divide are padded with zeros for the
    network to read.

    Args:
        in_channels: of the latents.
        sample_size: side of the latents trained at, in latent pixels.
        nhead: attention heads.
        num_encoder_layers: self-attention blocks over the text.
        dropout: on each block's changes.
        predict_variance: predict a log-variance for every value, too.
        predict_residual: predict the change of a state instead of the next state.
    """

    _counted: ClassVar[tuple[str, ...]] = ("num_encoder_layers", "num_decoder_layers")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 128,
        patch_size: int = 8,
        text_embed_dim: int = 2048,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 3,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        num_steps: int = 5,
        predict_variance: bool = False,
        predict_residual: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("patch_size", patch_size), ("num_steps", num_steps)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if d_model % 4:
            raise ValueError(f"`d_model` must be a multiple of 4, got {d_model}.")
        self.text_reader = TextReader(
            text_embed_dim,
            d_model,
            num_layers=num_encoder_layers,
            num_heads=nhead,
            feedforward=dim_feedforward,
            dropout=dropout,
        )
        patch_dim = in_channels * patch_size**2
        self.embed_patch = nn.Linear(patch_dim, d_model)
        self.frame_positions = nn.Embedding(num_steps, d_model)
        nn.init.normal_(self.frame_positions.weight, std=0.02)
        self.project_positions = nn.Linear(d_model, d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, nhead, dim_feedforward, dropout, context_width=d_model)
            for _ in range(num_decoder_layers)
        )
        self.norm_out = nn.LayerNorm(d_model)
        outputs = patch_dim * (2 if predict_variance else 1)
        self.head = nn.Linear(d_model + patch_dim, outputs)
        if predict_residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def read_text(self, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> ReadText:
        """Tokens `(batch, 1 + tokens, d_model)` and which of them are read."""
        return self.text_reader(text_embed, attention_mask)

    def predict_frames(
        self, frames: torch.Tensor, text: ReadText, memory: FrameMemory | None
    ) -> tuple[torch.Tensor, FrameMemory]:
        """As `NoiseSequenceNetwork.predict_frames`; the memory holds every block's keys and values."""
        steps, (height, width) = frames.shape[1], frames.shape[-2:]
        patches, grid = to_patches(frames.flatten(0, 1), self.config.patch_size)
        patches = patches.unflatten(0, (-1, steps))
        earlier = 0 if memory is None else memory.num_frames
        tokens = self._embed(patches, grid, earlier)
        mask = None
        if steps > 1:
            num_patches = patches.shape[2]
            # Keys are all frames so far, queries the new ones alone: the last rows of the whole mask.
            mask = frame_causal_mask(earlier + steps, num_patches, frames.device)
            mask = mask[earlier * num_patches :]
        keys_values = []
        for index, block in enumerate(self.blocks):
            tokens, kept = block(
                tokens,
                text.tokens,
                mask=mask,
                context_mask=text.mask,
                past=None if memory is None else memory.keys_values[index],
            )
            keys_values.append(kept)
        seen = torch.cat([self.norm_out(tokens), patches.flatten(1, 2)], 2)
        output = self.head(seen).unflatten(1, (steps, -1)).flatten(0, 1)
        output = from_patches(output, grid, self.config.patch_size).unflatten(0, (-1, steps))
        return output[..., :height, :width], FrameMemory(keys_values, earlier + steps)

    def _embed(self, patches: torch.Tensor, grid: tuple[int, int], earlier: int) -> torch.Tensor:
        """Tokens `(batch, steps * patches, d_model)` with the positions of patch and frame."""
        config = self.config
        places = patch_positions(*grid, config.d_model, config.sample_size / config.patch_size / 2, patches.device)
        steps = torch.arange(earlier, earlier + patches.shape[1], device=patches.device)
        tokens = self.embed_patch(patches) + self.project_positions(places.to(patches.dtype))
        return (tokens + self.frame_positions(steps)[:, None]).flatten(1, 2)

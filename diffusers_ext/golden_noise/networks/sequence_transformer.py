"""A transformer over the frames of a noise sequence: all patches of a frame, earlier frames, the prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, check_channels, check_text
from diffusers_ext.golden_noise.networks.golden_noise_model import (
    KeysValues,
    ReadText,
    TextReader,
    TransformerBlock,
    from_patches,
    patch_positions,
    to_patches,
)
from diffusers_ext.golden_noise.noise_statistics import match_energy

MOST_LOGVAR = 10.0
Generators = torch.Generator | list[torch.Generator] | None


class SequencePrediction(NamedTuple):
    """Distribution of the next state, for each state of a sequence."""

    mean: torch.Tensor  # (batch, steps, channels, height, width)
    logvar: torch.Tensor | None  # of the same shape, with `predict_variance`


class NoiseSequenceNetwork(GoldenNoiseNetwork):
    """A network that predicts state t + 1 of a noise sequence from the states up to t and a prompt.

    State 0 is random noise, state t the noise after t steps towards the prompt. Subclasses are models with the config
    fields `in_channels`, `text_embed_dim`, `num_steps`, `predict_variance` and `predict_residual` (and `pooled_text`
    where they may read pooled embeddings), and define `read_text` and `predict_frames`.
    """

    def read_text(self, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        """What `predict_frames` reads of a prompt, computed once a sequence."""
        raise TypeError(f"{type(self).__name__} must define `read_text`.")

    def predict_frames(self, frames: torch.Tensor, text: Any, memory: Any | None) -> tuple[torch.Tensor, Any]:
        """The head's output for frames that follow those in `memory`, and the memory with them.

        Frames and output are `(batch, steps, channels, height, width)` in the network's dtype, the output of twice the
        channels with `predict_variance`; the first frames have no memory.
        """
        raise TypeError(f"{type(self).__name__} must define `predict_frames`.")

    def forward(
        self,
        noise_sequence: torch.Tensor,
        text_embed: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        num_steps: int | None = None,
        generator: Generators = None,
    ) -> SequencePrediction | torch.Tensor:
        """Predict states 1 to steps at once, each from the true states of the sequence up to it.

        With `num_steps` it is `generate_sequence`, which comes this way for the hooks that bring offloaded weights in:
        they see the module called, not its methods. Shapes, text and errors as there.
        """
        if num_steps is not None:
            return self._generate(noise_sequence, text_embed, attention_mask, num_steps, generator)
        if noise_sequence.ndim != 5:
            raise ValueError(
                f"`noise_sequence` must be (batch, steps, channels, height, width), got {tuple(noise_sequence.shape)}."
            )
        self._check_steps(noise_sequence.shape[1])
        self._check_input(noise_sequence[:, 0], text_embed, attention_mask)
        text = self.read_text(text_embed.to(self.dtype), attention_mask)
        return self._predict(noise_sequence, text, None)[0]

    @torch.no_grad()
    def generate_sequence(
        self,
        initial_noise: torch.Tensor,
        text_embed: torch.Tensor | TextConditioning,
        num_steps: int,
        generator: Generators = None,
        *,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict a sequence step by step, each state from the network's own earlier ones.

        Every state gets the energy of the noise it came from. Deterministic without a generator: each state is then
        the mean. In eval mode; the mode comes back afterwards.

        Args:
            initial_noise: `(batch, channels, height, width)`, unit variance.
            text_embed: `(batch, tokens, dim)`, or what the class says; or what `encode_prompts` gave, of which the
                mask is read too, unless there is an `attention_mask`.
            num_steps: states to predict, at most those that the network was made for.
            generator: draws each state from the predicted Gaussian (`predict_variance`); one, or one a sample.
            attention_mask: `(batch, tokens)`, nonzero where a token is read; all when `None`.

        Returns:
            `(batch, num_steps, channels, height, width)` in the dtype of `initial_noise`; the last state is the golden
            noise.
        """
        if isinstance(text_embed, TextConditioning):
            text = text_embed
            if not self.config.get("pooled_text"):
                text_embed = text.prompt_embeds
                attention_mask = text.attention_mask if attention_mask is None else attention_mask
            elif text.pooled_prompt_embeds is not None:
                text_embed = text.pooled_prompt_embeds
            else:
                raise ValueError(
                    "`text_embed` must have `pooled_prompt_embeds` for a network with `pooled_text`, "
                    "got None. Use a model whose text encoder pools."
                )
        return self(initial_noise, text_embed, attention_mask, num_steps=num_steps, generator=generator)

    def golden_noise(
        self,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last state of `generate_sequence` over all steps the network was made for."""
        if self.config.get("pooled_text"):
            if pooled_prompt_embeds is None:
                raise ValueError(
                    "`pooled_prompt_embeds` must be given to a network with `pooled_text`, got None. "
                    "Use a model whose text encoder pools, or train with `pooled_text=False`."
                )
            prompt_embeds, attention_mask = pooled_prompt_embeds, None
        states = self.generate_sequence(noise, prompt_embeds, self.config.num_steps, attention_mask=attention_mask)
        return states[:, -1]

    def _generate(
        self,
        initial_noise: torch.Tensor,
        text_embed: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_steps: int,
        generator: Generators,
    ) -> torch.Tensor:
        self._check_steps(num_steps)
        self._check_input(initial_noise, text_embed, attention_mask)
        if generator is not None and not self.config.predict_variance:
            raise ValueError(
                "`generator` must be None for a network without `predict_variance`, which has no "
                f"distribution to sample from, got {generator}."
            )
        with module_eval_mode(self):
            text = self.read_text(text_embed.to(self.dtype), attention_mask)
            state, memory, states = initial_noise, None, []
            for _ in range(num_steps):
                (mean, logvar), memory = self._predict(state[:, None], text, memory)
                following = mean[:, 0]
                if generator is not None:
                    noise = randn_tensor(following.shape, generator, following.device, following.dtype)
                    following = following + (0.5 * logvar[:, 0]).exp() * noise
                state = match_energy(following, state)
                states.append(state)
        return torch.stack(states, 1)

    def _predict(self, frames: torch.Tensor, text: Any, memory: Any | None) -> tuple[SequencePrediction, Any]:
        output, memory = self.predict_frames(frames.to(self.dtype), text, memory)
        mean, logvar = output.to(frames.dtype), None
        if self.config.predict_variance:
            mean, logvar = mean.chunk(2, dim=2)
            logvar = logvar.clamp(-MOST_LOGVAR, MOST_LOGVAR)
        if self.config.predict_residual:
            mean = frames + mean
        return SequencePrediction(mean, logvar), memory

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= self.config.num_steps:
            raise ValueError(
                f"`num_steps` must be 1 to {self.config.num_steps}, the steps that the network was "
                f"made for, got {steps}."
            )

    def _check_input(self, noise: torch.Tensor, text_embed: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        check_text(noise, text_embed, attention_mask)
        check_channels(noise, text_embed, self.config.in_channels, self.config.text_embed_dim)


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
        sample_size: side of the latents trained at, in latent pixels.
        num_encoder_layers: self-attention blocks over the text.
        dropout: on each block's changes.
        predict_variance: predict a log-variance for every value, too.
        predict_residual: predict the change of a state instead of the next state.
    """

    _counted = ("num_encoder_layers", "num_decoder_layers")

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
        """The memory holds every block's keys and values."""
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

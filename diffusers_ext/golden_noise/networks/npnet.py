"""NPNet, the network of the golden-noise paper, on noise of any size: windows, blended by their changes.

Noise is never resized: a stretched map has less variance, and its neighbours are correlated. Where a side is too
short, the noise is continued by more white noise, and the result is cropped.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.normalization import AdaGroupNorm
from torch import nn
from transformers import SwinConfig

from diffusers_ext.families.family import Family
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.networks.files import convert_npnet, find_variant, read_checkpoint
from diffusers_ext.golden_noise.networks.npnet_branches import NoiseCrossAttention, NoiseTransformer, SVDBranch, linear

SIGNS = ("canonical", "backend")


def window_starts(length: int, window: int) -> list[int]:
    """First positions of evenly spread windows that cover `length`, overlapping by a quarter or more."""
    step = max(1, window * 3 // 4)
    count = 1 + math.ceil((length - window) / step)
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def blending_weights(window: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`(window, window)` float32: 1 in the middle, falling linearly to the borders, never 0."""
    place = torch.arange(window, device=device)
    side = torch.minimum(place + 1, window - place).float()
    side = side / side.max()
    return side[:, None] * side[None, :]


def continue_noise(noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The noise in the middle of more white noise.

    Each sample draws it by a seed of its own signs, which scaling and rounding leave: the same noise is continued
    alike in any batch and on any device.
    """
    rows, columns = noise.shape[-2:]
    top, left = (height - rows) // 2, (width - columns) // 2
    drawn = []
    for one in noise:
        signs = (one.detach() > 0).cpu().numpy().tobytes()
        seed = int.from_bytes(hashlib.sha256(signs).digest()[:8], "little") >> 1
        drawn.append(torch.randn(one.shape[0], height, width, generator=torch.Generator().manual_seed(seed)))
    continued = torch.stack(drawn).to(noise)
    continued[..., top : top + rows, left : left + columns] = noise
    return continued


def apply_in_windows(
    function: Callable[[torch.Tensor], torch.Tensor], noise: torch.Tensor, window: int
) -> torch.Tensor:
    """Apply a function of `window x window` noise to noise of any size, continued where a side is too short.

    What the function changes is averaged where windows overlap; the noise itself is never averaged nor resized, as
    either would make neighbours correlate and the variance fall.
    """
    rows, columns = noise.shape[-2:]
    height, width = max(rows, window), max(columns, window)
    if (height, width) != (rows, columns):
        changed = apply_in_windows(function, continue_noise(noise, height, width), window)
        top, left = (height - rows) // 2, (width - columns) // 2
        return changed[..., top : top + rows, left : left + columns]
    if (height, width) == (window, window):
        return function(noise)
    weights = blending_weights(window, noise.device).to(noise.dtype)
    change, total = torch.zeros_like(noise), noise.new_zeros(height, width)
    for top in window_starts(height, window):
        for left in window_starts(width, window):
            place = (..., slice(top, top + window), slice(left, left + window))
            change[place] += weights * (function(noise[place]) - noise[place])
            total[place] += weights
    return noise + change / total


def text_windows(text: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Parts of `length` tokens that cover a text, as few as possible, evenly spread.

    A multiple of `length` is cut where programs for long prompts join the encodings of its parts.
    """
    tokens = text.shape[1]
    count = math.ceil(tokens / length)
    starts = [round(i * (tokens - length) / max(1, count - 1)) for i in range(count)]
    return [text[:, start : start + length] for start in starts]


class TextNorm(AdaGroupNorm):
    """Normalised noise, scaled and shifted per channel by all text tokens at once."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift = linear(self.linear, emb)[:, :, None, None].chunk(2, dim=1)
        normalised = nn.functional.group_norm(x, self.num_groups, eps=self.eps)
        return normalised * (1 + scale) + shift


class NPNet(GoldenNoiseNetwork, ModelMixin, ConfigMixin):
    """`x -> SVD(x) + (2 sigmoid(alpha) - 1) e + beta NT(x + e)`, `e` the text-scaled noise.

    The network of "Golden Noise for Diffusion Models" (arXiv:2411.09502, Eq. 5 to 7): it edits the noise's singular
    values, adds the noise scaled by the text and what a Swin makes of both. The defaults are the published SDXL
    network, with all its properties: one size of noise and one number of tokens, which `refine` carries to others in
    windows, and no attention mask (padding is read as it is). Other structures than the published are config fields,
    so a loaded model knows its own.

    Args:
        in_channels: of the noise; a square number, as the channels are laid out as a square.
        text_embed_dim: 2048 for SDXL, 1024 for Hunyuan-DiT.
        svd_hidden_dim: width of the networks of the singular vectors.
        svd_output_dim: width of the network of the pooled tokens.
        svd_signs: which of the two signs a pair of singular vectors gets: `"canonical"` (the same on every machine) or
            `"backend"` (that of `torch.linalg.svd`, as in the official code).
        swin_embed_dim: width of Swin's first stage.
        swin_window_size: patches of a window's side.
        svd_dropout: LayerNorm, GELU, dropout and stochastic depth in the SVD branch.
        nt_adapter: a residual convolution block before the Swin.
        nt_finetune: train only the last two stages of the Swin instead of all.
        nt_dropout: drop channels of the Swin branch's output in training.
        cross_attention: the Swin branch's output attends to the text-scaled noise.
    """

    _counted = ("swin_depths",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 128,
        text_embed_dim: int = 2048,
        text_length: int = 77,
        svd_hidden_dim: int = 64,
        svd_output_dim: int = 1024,
        svd_num_heads: int = 8,
        svd_signs: str = "canonical",
        swin_image_size: int = 224,
        swin_patch_size: int = 4,
        swin_embed_dim: int = 96,
        swin_depths: Sequence[int] = (2, 2, 6, 2),
        swin_num_heads: Sequence[int] = (3, 6, 12, 24),
        swin_window_size: int = 7,
        svd_dropout: bool = False,
        nt_adapter: bool = False,
        nt_finetune: bool = False,
        nt_dropout: bool = False,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        _check_config(self.config)
        self.text_norm = TextNorm(text_length * text_embed_dim, in_channels, 1, eps=1e-6)
        self.svd_branch = SVDBranch(
            in_channels,
            sample_size,
            hidden_dim=svd_hidden_dim,
            output_dim=svd_output_dim,
            num_heads=svd_num_heads,
            dropout=svd_dropout,
            signs=svd_signs,
        )
        swin = SwinConfig(
            image_size=swin_image_size,
            patch_size=swin_patch_size,
            embed_dim=swin_embed_dim,
            depths=list(swin_depths),
            num_heads=list(swin_num_heads),
            window_size=swin_window_size,
        )
        self.noise_transformer = NoiseTransformer(
            in_channels, sample_size, swin, adapter=nt_adapter, finetune=nt_finetune, dropout=nt_dropout
        )
        self.noise_attention = NoiseCrossAttention(in_channels) if cross_attention else None
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> NPNet:
        """Load published weights: the official `.pth`, or safetensors with the same keys, flat.

        Args:
            variant: `"SDXL"` (also DreamShaper's) or `"Hunyuan-DiT"` to insist on one; the weights themselves tell
                which it is.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, a pickle that holds more than tensors, another network or another variant.
        """
        weights = read_checkpoint(path)
        try:
            found, config = find_variant(weights)
            if variant is not None and variant != found:
                raise ValueError(f"they must be of variant {variant!r}, got {found!r}.")
            model = cls(**config)
            model.load_state_dict(convert_npnet(weights, model.state_dict()))
        except ValueError as error:
            raise ValueError(f"{path} must hold weights of NPNet: {error}") from error
        return model.to(dtype or torch.float32).eval()

    def check_inputs(self, noise: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        """Raise `ValueError` for noise or text of another model, or too short a text."""
        config = self.config
        if noise.ndim != 4 or noise.shape[1] != config.in_channels:
            raise ValueError(
                f"`noise` must be (batch, {config.in_channels}, height, width), got "
                f"{tuple(noise.shape)}. This network was made for another latent space."
            )
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != config.text_embed_dim:
            raise ValueError(
                f"`prompt_embeds` must be (batch, tokens, {config.text_embed_dim}), got "
                f"{tuple(prompt_embeds.shape)}. Use the network of this text encoder."
            )
        if prompt_embeds.shape[1] < config.text_length or len(prompt_embeds) != len(noise):
            raise ValueError(
                f"`prompt_embeds` must hold {config.text_length} tokens or more for each of the {len(noise)} noises, "
                f"got {tuple(prompt_embeds.shape)}. Encode the prompt padded to {config.text_length} tokens."
            )

    def forward(self, noise: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """The published network, on noise of one size and text of one length."""
        self.check_inputs(noise, prompt_embeds)
        if noise.shape[-2:] != (self.config.sample_size,) * 2:
            raise ValueError(
                f"`noise` must be {self.config.sample_size} high and wide, got "
                f"{tuple(noise.shape)}. `refine` takes noise of any size, window by window."
            )
        if prompt_embeds.shape[1] != self.config.text_length:
            raise ValueError(
                f"`prompt_embeds` must hold {self.config.text_length} tokens, got "
                f"{tuple(prompt_embeds.shape)}. `refine` takes longer texts, part by part."
            )
        scaled = self.text_norm(noise, prompt_embeds.flatten(1))
        features = self.noise_transformer(noise + scaled)
        if self.noise_attention is not None:
            features = self.noise_attention(features, scaled)
        gate = 2 * self.alpha.sigmoid() - 1
        return self.svd_branch(noise) + gate * scaled + self.beta * features

    def golden_noise(
        self,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward`, window by window where the noise has another size (`apply_in_windows`).

        Of a text longer than `text_length` tokens each part is read by itself (`text_windows`), and the changes of all
        parts are averaged. The network reads padding tokens as it was trained to; mask and pooled embeddings are not
        used.
        """
        self.check_inputs(noise, prompt_embeds)
        golden = [
            # Through the module's hooks.
            apply_in_windows(partial(self, prompt_embeds=part), noise, self.config.sample_size)
            for part in text_windows(prompt_embeds, self.config.text_length)
        ]
        return golden[0] if len(golden) == 1 else torch.stack(golden).mean(0)


def refuse_npnet(family: Family, in_channels: int) -> None:
    """Raise `ValueError` for a base model that no NPNet fits: texts of any length, or channels that are no square."""
    if not family.pads_text:
        found = "whose texts are as long as their prompts: NPNet was made for one number of tokens"
    elif math.isqrt(in_channels) ** 2 != in_channels:
        found = f"whose latents have {in_channels} channels: NPNet lays them out as a square"
    else:
        return
    raise ValueError(f"The network must be none of NPNet for {family.title}, {found}. Use a GoldenNoiseModel.")


def _check_config(config: dict) -> None:
    """Raise `ValueError` for sizes that no NPNet can have."""
    channels = config["in_channels"]
    if channels < 1 or math.isqrt(channels) ** 2 != channels:
        raise ValueError(
            "`in_channels` must be a square number, as the channels are laid out as a square of "
            f"tiles for the SVD, got {channels}."
        )
    if config["svd_signs"] not in SIGNS:
        raise ValueError(f"`svd_signs` must be one of {SIGNS}, got {config['svd_signs']!r}.")
    side = math.isqrt(channels) * config["sample_size"]
    if side % config["svd_num_heads"]:
        raise ValueError(
            f"`svd_num_heads` must divide {side}, the side of the noise's matrix, got {config['svd_num_heads']}."
        )
    if len(config["swin_depths"]) != len(config["swin_num_heads"]):
        raise ValueError(
            "`swin_num_heads` must have one entry per stage like `swin_depths` "
            f"{tuple(config['swin_depths'])}, got {tuple(config['swin_num_heads'])}."
        )

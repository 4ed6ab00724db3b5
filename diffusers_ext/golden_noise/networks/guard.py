"""A head that says where golden noise gains for a prompt and seed; noise of which it expects too little stays."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_ext.golden_noise.first_prediction import Predict
from diffusers_ext.golden_noise.low_frequencies import to_coarse
from diffusers_ext.golden_noise.networks.files import CheckedWeights, read_network_config
from diffusers_ext.golden_noise.networks.golden_noise_model import (
    TextReader,
    TransformerBlock,
    patch_positions,
    to_patches,
)
from diffusers_ext.hub.saved_pipelines import with_known_dtype

READS = ("prediction", "noise")
TARGETS = ("rank", "gain")


class NoiseGuard(CheckedWeights, ModelMixin, ConfigMixin):
    """`gain_scale head(mean of transformer(patches of what it reads, tokens of the prompt))`.

    It learns the rewards of all pairs that were judged, kept or not. `refine` of a network whose `guard` it is leaves
    the noise of a seed as it is unless what it expects is above `threshold`. It reads all at `bands` x `bands`,
    whatever the noise's size, and computes in float32.

    Args:
        in_channels, text_embed_dim: those of the network.
        bands: of the lowest frequencies a side that it sees.
        gain_scale: what an output of one stands for.
        threshold: what must be expected for noise to be changed.
        reads: besides the network's change: `"noise"`, or the `"prediction"` of the clean latents that the model makes
            of the noise at its first step, one denoiser call.
        target: what it expects: the `"rank"` of the gain among those it learned from, from 0 to 1, or the `"gain"` in
            units of the reward.
        prediction_steps: of the grid whose first step the prediction is of.
    """

    _counted = ("num_layers",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        text_embed_dim: int = 2048,
        bands: int = 8,
        patch_size: int = 2,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        gain_scale: float = 1.0,
        threshold: float = 0.0,
        reads: str = "noise",
        target: str = "gain",
        prediction_steps: int = 10,
    ) -> None:
        super().__init__()
        for name, value, known in (("reads", reads, READS), ("target", target, TARGETS)):
            if value not in known:
                raise ValueError(f"`{name}` of a guard must be one of {known}, got {value!r}.")
        self.embed = nn.Linear(2 * in_channels * patch_size**2, width)
        self.text = TextReader(text_embed_dim, width, num_layers=0, num_heads=num_heads, feedforward=width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, 4 * width, context_width=width) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> NoiseGuard:
        """`ModelMixin.from_pretrained` in eval mode, once the weights are found whole and those of the config."""
        cls.check_arguments(kwargs)
        kwargs.setdefault("use_safetensors", True)
        config = read_network_config(pretrained_model_name_or_path, kwargs)
        if config.get("_class_name") != cls.__name__:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a {cls.__name__}, got {config.get('_class_name')!r} in "
                f"{pretrained_model_name_or_path}. A guard lies in the folder `guard` of its network."
            )
        cls.check_files(pretrained_model_name_or_path, config, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **with_known_dtype(kwargs))

    def inputs(self, noise: torch.Tensor, golden: torch.Tensor, predict: Predict | None = None) -> torch.Tensor:
        """What it reads: `(batch, 2 channels, at most bands, at most bands)`; `predict` as of `refine`."""
        read = torch.cat([self._of_the_seed(noise, predict), golden.float() - noise.float()], 1)
        return to_coarse(read, self.config.bands)

    def _of_the_seed(self, noise: torch.Tensor, predict: Predict | None) -> torch.Tensor:
        if self.config.reads == "noise":
            return noise.float()
        if predict is None:
            raise ValueError(
                "`predict` must be given to `refine` of a network whose guard reads the model's prediction, got None. "
                "Pass `first_prediction(pipeline, encode_prompts(pipeline, prompts))`, draw with a golden-noise "
                "pipeline, which hands it over, or take the guard off with `set_guard(None)`."
            )
        predicted = predict(noise, self.config.prediction_steps)
        if predicted.shape != noise.shape or not predicted.isfinite().all():
            raise ValueError(
                f"`predict` must give finite latents {tuple(noise.shape)} like the noise, got {tuple(predicted.shape)}"
                f"{'' if predicted.isfinite().all() else ' with NaN'}."
            )
        return predicted.to(noise.device).float()

    def forward(
        self, read: torch.Tensor, prompt_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is expected, `(batch,)` float32, of what `inputs` gave."""
        config = self.config
        patches, grid = to_patches(read, config.patch_size)
        highest = config.bands / config.patch_size / 2
        tokens = self.embed(patches) + patch_positions(*grid, config.width, highest, read.device)
        text = self.text(prompt_embeds.float(), attention_mask)
        for block in self.blocks:
            tokens, _ = block(tokens, text.tokens, context_mask=text.mask)
        return config.gain_scale * self.head(self.norm(tokens).mean(1))[:, 0]

    def keep_expected_gains(
        self,
        golden: torch.Tensor,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        predict: Predict | None = None,
    ) -> torch.Tensor:
        """Golden noise where more than the threshold is expected, elsewhere `noise` to the bit."""
        self.to(noise.device)
        expected = self(self.inputs(noise, golden, predict), prompt_embeds, attention_mask)
        return torch.where((expected > self.config.threshold).view(-1, 1, 1, 1), golden, noise)


def gain_ranks(gains: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Of each gain the share of those `among` which it lies that are smaller; of equal ones half counts."""
    ordered = among.sort().values
    below, up_to = (torch.searchsorted(ordered, gains.contiguous(), right=right) for right in (False, True))
    return (below + up_to) / (2 * len(ordered))


class GuardFigures(NamedTuple):
    """What a guard does to pairs whose gains are known."""

    threshold: float
    share_changed: float
    gain_kept: float  # of the sum of all gains, 1 without a guard; 0 where that sum is no gain
    losses: float  # share of pairs that lose without a guard
    losses_left: float  # share of all pairs that lose with it
    losses_avoided: float  # share of the losing pairs that stay unchanged
    win_rate: float  # without a guard; a tie is half a win
    win_rate_changed: float  # among the changed pairs


def guard_figures(gains: torch.Tensor, expected: torch.Tensor, threshold: float) -> GuardFigures:
    """Figures of a guard by the true `gains` and those that it `expected`, both `(pairs,)`."""
    if not len(gains):
        raise ValueError("`gains` must hold at least one pair, got none.")
    changed, losing, total = expected > threshold, gains < 0, gains.double().sum()
    wins = (gains > 0).double() + 0.5 * (gains == 0).double()
    left = (changed & losing).double()
    return GuardFigures(
        float(threshold),
        changed.double().mean().item(),
        (gains[changed].double().sum() / total).item() if total > 0 else 0.0,
        losing.double().mean().item(),
        left.mean().item(),
        1 - (left.sum() / losing.sum().clamp(min=1)).item(),
        wins.mean().item(),
        wins[changed].mean().item() if changed.any() else 0.0,
    )


def choose_threshold(gains: torch.Tensor, expected: torch.Tensor, gain_lost: float) -> float:
    """The highest threshold at which at most this share of the summed gain is lost; changes the fewest noises.

    Where all gains together are none, it is what the most promising noise is expected to gain: nothing is changed.
    """
    if not 0 <= gain_lost < 1:
        raise ValueError(f"`gain_lost` must be in [0, 1), got {gain_lost}.")
    total = gains.double().sum()
    if total <= 0:
        return expected.max().item()
    order = expected.argsort(descending=True)
    enough = gains[order].double().cumsum(0) >= (1 - gain_lost) * total
    last = int(enough.nonzero()[0])  # the sum of all is enough
    below = expected[order[last + 1]] if last + 1 < len(order) else expected[order[last]] - 1
    return ((expected[order[last]] + below) / 2).item()

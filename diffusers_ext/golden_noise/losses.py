"""Losses of golden-noise networks and what they are compared with: the noise left as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from diffusers_ext.golden_noise.networks.sequence_transformer import gaussian_nll, output_statistics_kl, squared_error
from diffusers_ext.golden_noise.text_cache import NetworkText, TextCache


class ChangeFigures(NamedTuple):
    """How well a change of noise is predicted, per sample `(batch,)`."""

    error: torch.Tensor  # mean((prediction - target)^2)
    identity_error: torch.Tensor  # mean((noise - target)^2): of the noise left as it is
    cosine: torch.Tensor  # of predicted and true change


def change_figures(prediction: torch.Tensor, target: torch.Tensor, noise: torch.Tensor) -> ChangeFigures:
    """Compare a predicted change of noise with the true one and with no change at all.

    Args:
        prediction, target, noise: `(batch, channels, height, width)`.
    """
    predicted, true = ((x - noise).flatten(1) for x in (prediction, target))
    return ChangeFigures(
        (predicted - true).square().mean(1), true.square().mean(1), F.cosine_similarity(predicted, true, dim=1)
    )


def relative_error(figures: ChangeFigures) -> torch.Tensor:
    """`mse(prediction, target) / mse(noise, target)`: 1 is the noise left as it is, 0 is perfect."""
    return figures.error.sum() / figures.identity_error.sum()


def pair_inputs(text: NetworkText, masked: bool) -> dict[str, torch.Tensor | None]:
    """Keyword arguments of a pair network's `forward` besides the noise."""
    inputs = {"prompt_embeds": text.prompt_embeds}
    return {**inputs, "attention_mask": text.attention_mask} if masked else inputs


def sequence_inputs(text: NetworkText, pooled: bool) -> dict[str, torch.Tensor | None]:
    """Keyword arguments of a sequence network's `forward` besides the noises.

    Raises:
        ValueError: pooled embeddings are asked for and there are none.
    """
    if not pooled:
        return {"text_embed": text.prompt_embeds, "attention_mask": text.attention_mask}
    if text.pooled_prompt_embeds is None:
        raise ValueError("`text` must have pooled embeddings, got none. Read its tokens.")
    return {"text_embed": text.pooled_prompt_embeds}


@dataclass(frozen=True)
class PairLoss:
    """Mean squared error of the golden noise, `mse(network(noise, text), golden)`.

    Attributes:
        cache: the text of all prompts.
        device: where the network is.
        masked: whether the network takes an attention mask.
    """

    cache: TextCache
    device: torch.device
    masked: bool

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss`; `relative`, the loss over that of the identity; `cosine` of the changes."""
        noise = batch["noise"].to(self.device)
        target = batch["golden"][:, -1].to(self.device)
        text = self.cache.take(batch["text"], self.device)
        golden = model(noise, **pair_inputs(text, self.masked)).float()
        loss = F.mse_loss(golden, target)
        with torch.no_grad():
            figures = change_figures(golden, target, noise)
        return {"loss": loss, "relative": relative_error(figures), "cosine": figures.cosine.mean()}


@dataclass(frozen=True)
class SequenceLoss:
    """Teacher forcing: every state predicted from the true states before it.

    Squared error, or Gaussian NLL where the network predicts a variance, and `kl_weight` times the distance of the
    output's statistics from white noise.

    Attributes:
        cache: the text of all prompts.
        device: where the network is.
        pooled: whether the network reads pooled embeddings in place of tokens.
        kl_weight: of the second term; 0 leaves it out.
    """

    cache: TextCache
    device: torch.device
    pooled: bool = False
    kl_weight: float = 0.0

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss` and its parts; `relative_first`, `relative_last` and their `cosine_...`."""
        noise, target = batch["noise"].to(self.device), batch["golden"].to(self.device)
        states = torch.cat([noise[:, None], target[:, :-1]], 1)
        text = self.cache.take(batch["text"], self.device)
        mean, logvar = model(states, **sequence_inputs(text, self.pooled))
        mean, logvar = mean.float(), None if logvar is None else logvar.float()
        if logvar is None:
            losses = {"loss": squared_error(mean, target)}
        else:
            losses = {"loss": gaussian_nll(mean, logvar, target)}
        if self.kl_weight:
            kl = output_statistics_kl(mean, logvar)
            losses = {"loss": losses["loss"] + self.kl_weight * kl, "kl": kl}
        with torch.no_grad():
            for name, step in (("first", 0), ("last", -1)):
                figures = change_figures(mean[:, step], target[:, step], states[:, step])
                losses[f"relative_{name}"] = relative_error(figures)
                losses[f"cosine_{name}"] = figures.cosine.mean()
        return losses

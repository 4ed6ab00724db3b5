"""Losses of golden-noise networks and guards, and what they are compared with: the noise left as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.text_cache import TextCache


class ChangeFigures(NamedTuple):
    """How well a change of noise is predicted, per sample `(batch,)`."""

    error: torch.Tensor  # mean((prediction - target)^2)
    identity_error: torch.Tensor  # mean((noise - target)^2): of the noise left as it is
    cosine: torch.Tensor  # of predicted and true change


def change_figures(prediction: torch.Tensor, target: torch.Tensor, noise: torch.Tensor) -> ChangeFigures:
    """Compare a predicted change of noise with the true one and with no change at all."""
    predicted, true = ((x - noise).flatten(1) for x in (prediction, target))
    return ChangeFigures(
        (predicted - true).square().mean(1), true.square().mean(1), F.cosine_similarity(predicted, true, dim=1)
    )


def relative_error(figures: ChangeFigures) -> torch.Tensor:
    """`mse(prediction, target) / mse(noise, target)`: 1 is the noise left as it is, 0 is perfect."""
    return figures.error.sum() / figures.identity_error.sum()


def squared_error(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error, `mean((y - mu)^2)`."""
    _check_same_shape("target", target, mean)
    return (target - mean).square().mean()


def gaussian_nll(mean: torch.Tensor, logvar: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of a diagonal Gaussian, without its constant.

    `mean(0.5 * ((y - mu)^2 * exp(-l) + l))`; at fixed mu its minimum is `l = log (y - mu)^2`.
    """
    _check_same_shape("target", target, mean)
    _check_same_shape("logvar", logvar, mean)
    return 0.5 * ((target - mean).square() * torch.exp(-logvar) + logvar).mean()


def output_statistics_kl(mean: torch.Tensor, logvar: torch.Tensor | None = None) -> torch.Tensor:
    """How far the values of each output noise, taken together, are from a unit Gaussian.

    `KL(N(m, v) || N(0, 1)) = 0.5 * (v + m^2 - 1 - log v)` per sample and step, averaged, with m the mean over all
    values of one output noise and v their variance; under a predicted variance the law of total variance gives `v =
    var(mu) + mean(exp(l))`. A noise close to white satisfies it however sure the network is of each value; the same
    term on every single value would ask for mu = 0 and variance 1, a fresh random noise.
    """
    values = mean.flatten(2)
    centre = values.mean(2)
    variance = values.var(2, correction=0)
    if logvar is not None:
        _check_same_shape("logvar", logvar, mean)
        variance = variance + logvar.exp().flatten(2).mean(2)
    return 0.5 * (variance + centre.square() - 1 - variance.log()).mean()


def _check_same_shape(name: str, given: torch.Tensor, mean: torch.Tensor) -> None:
    if given.shape != mean.shape:
        raise ValueError(f"`{name}` must have the shape of `mean`, {tuple(mean.shape)}, got {tuple(given.shape)}.")


def pair_inputs(text: TextConditioning, masked: bool) -> dict[str, torch.Tensor | None]:
    """Keyword arguments of a pair network's `forward` besides the noise."""
    inputs = {"prompt_embeds": text.prompt_embeds}
    return {**inputs, "attention_mask": text.attention_mask} if masked else inputs


def sequence_inputs(text: TextConditioning, pooled: bool) -> dict[str, torch.Tensor | None]:
    """Keyword arguments of a sequence network's `forward` besides the noises."""
    if not pooled:
        return {"text_embed": text.prompt_embeds, "attention_mask": text.attention_mask}
    if text.pooled_prompt_embeds is None:
        raise ValueError("`text` must have pooled embeddings, got none. Read its tokens.")
    return {"text_embed": text.pooled_prompt_embeds}


@dataclass(frozen=True)
class PairLoss:
    """Mean squared error of the golden noise, `mse(network(noise, text), golden)`."""

    cache: TextCache
    device: torch.device  # of the network
    masked: bool  # whether the network takes an attention mask

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
    """

    cache: TextCache
    device: torch.device  # of the network
    pooled: bool = False  # whether the network reads pooled embeddings in place of tokens
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
        losses = {"loss": squared_error(mean, target) if logvar is None else gaussian_nll(mean, logvar, target)}
        if self.kl_weight:
            kl = output_statistics_kl(mean, logvar)
            losses = {"loss": losses["loss"] + self.kl_weight * kl, "kl": kl}
        with torch.no_grad():
            for name, step in (("first", 0), ("last", -1)):
                figures = change_figures(mean[:, step], target[:, step], states[:, step])
                losses[f"relative_{name}"] = relative_error(figures)
                losses[f"cosine_{name}"] = figures.cosine.mean()
        return losses


@dataclass(frozen=True)
class GuardLoss:
    """Squared error of what a guard expects, in units of the deviation `scale` of the goals."""

    cache: TextCache
    device: torch.device  # of the guard
    scale: float

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss`: 1 is the mean for all, 0 is perfect."""
        text = self.cache.take(batch["text"], self.device)
        expected = model(batch["input"].to(self.device), text.prompt_embeds, text.attention_mask)
        return {"loss": F.mse_loss(expected, batch["goal"].to(self.device)) / self.scale**2}

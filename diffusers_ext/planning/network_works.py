"""What the training of a golden-noise network does again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from torch.nn import functional

from diffusers_ext.golden_noise.model import GoldenNoiseModel
from diffusers_ext.golden_noise.npnet import NPNet
from diffusers_ext.golden_noise.pairs import source_noise
from diffusers_ext.golden_noise.sequence_losses import (
    gaussian_nll,
    output_statistics_kl,
    squared_error,
)
from diffusers_ext.golden_noise.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.planning.golden_noise_setting import SEQUENCE_NETWORKS, GoldenNoiseSetting
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.nullspace_works import OPTIMIZER, make_state
from diffusers_ext.planning.work import Job, Precision, Work


_CLASSES: dict[str, type[torch.nn.Module]] = {
    "golden_noise_model": GoldenNoiseModel,
    "npnet": NPNet,
    "transformer": NoiseSequenceTransformer,
    "rnn": NoiseSequenceRNN,
}
_KL_WEIGHT, _MAX_GRAD_NORM, _EMA_DECAY = 0.01, 1.0, 0.999


def network_of(shapes: ImageShapes, setting: GoldenNoiseSetting) -> torch.nn.Module:
    """The network on the meta device, in float32 as it trains.

    Raises:
        ValueError: a structure that the network cannot have.
    """
    channels, height, width = shapes.latents
    config = {"in_channels": channels, "text_embed_dim": shapes.text.width}
    config["sample_size"] = max(height, width)
    if setting.network == "npnet":
        config["text_length"] = shapes.text.tokens
    if setting.network in SEQUENCE_NETWORKS:
        config["num_steps"] = setting.num_steps
    with torch.device("meta"):
        network = _CLASSES[setting.network](**{**config, **setting.structure})
    if setting.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def kept_name(setting: GoldenNoiseSetting) -> str:
    """What stays from step to step besides the network."""
    return f"{OPTIMIZER} and averaged weights" if setting.use_ema else OPTIMIZER


def network_works(
    shapes: ImageShapes, setting: GoldenNoiseSetting, precision: Precision
) -> list[Work]:
    """The optimizer's step with its last batch, and the batches before it."""
    steps, before = setting.max_train_steps, setting.gradient_accumulation_steps - 1

    def step() -> Job:
        return _training_job(shapes, setting, precision, updates=True)

    def batch() -> Job:
        return _training_job(shapes, setting, precision, updates=False)

    name, kept = "network's activations and gradients", kept_name(setting)
    return [Work(name, steps, step, kept), Work(name, steps * before, batch, kept)]


def validation_work(
    shapes: ImageShapes, setting: GoldenNoiseSetting, rows: int, times: float
) -> Work:
    """A batch of pairs is measured."""

    def make() -> Job:
        network = network_of(shapes, setting).eval()

        def begin(device: torch.device) -> Callable[[], object]:
            batch = _Batch(shapes, setting, rows, device)

            @torch.no_grad()
            def repeat() -> None:
                batch.loss(network, Precision(torch.float32))
                if setting.network in SEQUENCE_NETWORKS:
                    network.generate_sequence(
                        batch.noise, batch.text, setting.num_steps, attention_mask=batch.mask
                    )

            return repeat

        return Job([network], begin)

    return Work("validation", times, make)


def _training_job(
    shapes: ImageShapes, setting: GoldenNoiseSetting, precision: Precision, *, updates: bool
) -> Job:
    network = network_of(shapes, setting)

    def begin(device: torch.device) -> Callable[[], object]:
        weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, foreach=precision.as_on_gpu)
        make_state(optimizer)
        if setting.gradient_accumulation_steps > 1:
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
        ema = EMAModel(network.parameters(), decay=_EMA_DECAY) if setting.use_ema else None
        batch = _Batch(shapes, setting, setting.train_batch_size, device)

        def repeat() -> None:
            batch.loss(network, precision).backward()
            if not updates:
                return
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM, foreach=precision.as_on_gpu)
            optimizer.step()
            optimizer.zero_grad(set_to_none=setting.gradient_accumulation_steps == 1)
            if ema is not None:
                ema.step(network.parameters())

        return repeat

    return Job([network], begin)


class _Batch:
    """Pairs or sequences without content, and the loss on them."""

    def __init__(
        self, shapes: ImageShapes, setting: GoldenNoiseSetting, rows: int, device: torch.device
    ) -> None:
        self.setting, self.shape, self.rows, self.device = setting, shapes.latents, rows, device
        text = shapes.conditioning(rows, device, torch.float32)
        self.text, self.mask = text.prompt_embeds, text.attention_mask
        self.golden = torch.randn(rows, setting.num_steps, *shapes.latents, device=device)

    def loss(self, network: torch.nn.Module, precision: Precision) -> torch.Tensor:
        """Noises from their seeds, forward pass and loss, as the training scripts have them."""
        self.noise = torch.stack([source_noise(seed, self.shape) for seed in range(self.rows)])
        self.noise = self.noise.to(self.device)
        if self.setting.network not in SEQUENCE_NETWORKS:
            masked = {} if self.setting.network == "npnet" else {"attention_mask": self.mask}
            with precision.autocast(network):
                golden = network(self.noise, self.text, **masked).float()
            _note_figures(golden, self.golden[:, -1], self.noise)
            return functional.mse_loss(golden, self.golden[:, -1])
        states = torch.cat([self.noise[:, None], self.golden[:, :-1]], 1)
        with precision.autocast(network):
            mean, logvar = network(states, self.text, self.mask)
        mean, logvar = mean.float(), None if logvar is None else logvar.float()
        for step in (0, -1):
            _note_figures(mean[:, step], self.golden[:, step], states[:, step])
        if logvar is None:
            loss = squared_error(mean, self.golden)
        else:
            loss = gaussian_nll(mean, logvar, self.golden)
        if self.setting.network == "rnn":
            loss = loss + _KL_WEIGHT * output_statistics_kl(mean, logvar)
        return loss


@torch.no_grad()
def _note_figures(
    prediction: torch.Tensor, target: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the log says of each batch."""
    predicted, true = ((x - noise).flatten(1) for x in (prediction, target))
    error = (predicted - true).square().mean(1).sum() / true.square().mean(1).sum()
    return error, functional.cosine_similarity(predicted, true, dim=1).mean()

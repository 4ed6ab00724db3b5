"""Subjects and rewards for evaluations of golden noise on a small random pipeline."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_ext.evaluation.golden_noise import evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from tests.training.stub_rewards import Brightness

PROMPTS = ["a red seven", "a blue one", "a green two"]
DRAWING = {"num_inference_steps": 2, "guidance_scale": 3.0, "show_progress": False}


class Redness:
    """Mean of the red channel, in [0, 1]."""

    name, version = "redness", "3"

    def score(self, images, prompts) -> torch.Tensor:
        reds = [sum(image.getchannel(0).tobytes()) for image in images]
        return torch.tensor(reds, dtype=torch.float32) / (255 * 32 * 32)


def moved(noise: torch.Tensor, text: Any) -> torch.Tensor:
    """Golden noise without a network: a fixed pattern on top."""
    return noise + 0.5 * torch.linspace(-1, 1, noise.shape[-1])


def unmoved(noise: torch.Tensor, text: Any) -> torch.Tensor:
    """The noise itself."""
    return noise.clone()


def small_network(text_embed_dim: int = 128) -> GoldenNoiseModel:
    """A network that changes noise; 8 x 8 latents of 4 channels."""
    torch.manual_seed(0)
    network = GoldenNoiseModel(sample_size=8, text_embed_dim=text_embed_dim, width=16, num_layers=1, num_heads=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def evaluate(pipeline: Any, **arguments: Any) -> GoldenNoiseReport:
    """A quick evaluation of `moved`, by brightness."""
    usual = {"refine": moved, "rewards": Brightness(), "best_of": 1, **DRAWING}
    return evaluate_golden_noise(pipeline, **{"prompts": PROMPTS, **usual, **arguments})

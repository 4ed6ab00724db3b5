"""Feature-wise linear modulation: a condition scales and shifts every channel."""

from __future__ import annotations

import torch
from torch import nn


class FiLM(nn.Module):
    """`(1 + gamma) * features + beta`, with gamma and beta a linear function of the condition.

    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer" (2018), with their
    `1 + gamma` form; the linear map starts at zero, so training starts from unchanged features.
    """

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.gamma_beta = nn.Linear(condition_dim, 2 * channels)
        nn.init.zeros_(self.gamma_beta.weight)
        nn.init.zeros_(self.gamma_beta.bias)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Args: `features` `(batch, channels, height, width)`, `condition` `(batch, condition_dim)`."""
        gamma, beta = self.gamma_beta(condition)[:, :, None, None].chunk(2, dim=1)
        return (1 + gamma) * features + beta

"""Tiny sequence networks whose heads are random, so that they predict something."""

from __future__ import annotations

import torch

from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer

STEPS, TEXT_DIM = 3, 12
SHARED = {"sample_size": 8, "text_embed_dim": TEXT_DIM, "num_steps": STEPS}
TRANSFORMER = {
    "patch_size": 2,
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "dim_feedforward": 24,
}
RNN = {
    "cnn_base_filters": 8,
    "cnn_num_blocks": (1, 1),
    "cnn_feat_dim": 16,
    "gru_hidden_size": 12,
    "gru_num_layers": 2,
    "num_attention_heads": 2,
    "num_attention_layers": 1,
}
NETWORKS = {"transformer": (NoiseSequenceTransformer, TRANSFORMER), "rnn": (NoiseSequenceRNN, RNN)}
Network = NoiseSequenceTransformer | NoiseSequenceRNN


def untrained(name: str, **options) -> Network:
    """As a user gets it: the identity."""
    torch.manual_seed(0)
    network_class, config = NETWORKS[name]
    return network_class(**{**SHARED, **config, **options}).eval()


def random_network(name: str, **options) -> Network:
    """Every weight that starts at zero is drawn, the head small enough for sane noise."""
    network = untrained(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def sequence_and_text(
    batch: int = 2, steps: int = STEPS, size: tuple[int, int] = (8, 8), channels: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noises `(batch, steps, channels, height, width)` and embeddings of five tokens."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch, steps, channels, *size, generator=generator)
    return noise, torch.randn(batch, 5, TEXT_DIM, generator=generator)

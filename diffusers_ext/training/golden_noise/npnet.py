"""Train a network from random to golden noise on noise pairs: NPNet or GoldenNoiseModel.

    accelerate launch training/train_npnet.py --model golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/pairs --use_ema --output_dir outputs/golden_noise_model
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusers_ext.golden_noise.losses import PairLoss
from diffusers_ext.golden_noise.settings import PairNetworkSettings
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.arguments import GOLDEN_NOISE_GROUPS
from diffusers_ext.training.golden_noise.data import target_steps
from diffusers_ext.training.golden_noise.run import NoiseTask, train_network
from diffusers_ext.training.golden_noise.validation import Measure, measure_pairs
from diffusers_ext.training.run.script import one_run_a_folder, run_script
from diffusers_ext.training.run.settings import parse_settings


def parse_args(input_args: Sequence[str] | None = None) -> PairNetworkSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(PairNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_GROUPS)


def make_loss(settings: PairNetworkSettings, cache: TextCache, device: torch.device) -> PairLoss:
    """The loss of `--model`; only NPNet reads padding like other tokens."""
    return PairLoss(cache, device, masked=settings.model != "npnet")


def make_measure(settings: PairNetworkSettings) -> Measure:
    """The figures of `--model`."""
    return measure_pairs(masked=settings.model != "npnet")


@one_run_a_folder
def main(settings: PairNetworkSettings) -> Path:
    """Train and save; returns the output folder."""
    return train_network(settings, NoiseTask("golden-noise", target_steps, make_loss, make_measure))


if __name__ == "__main__":
    run_script(parse_args, main, PairNetworkSettings)

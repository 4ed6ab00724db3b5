"""Train a network that predicts a sequence of ever better noises: a transformer or an RNN.

    accelerate launch training/train_noise_sequence.py --model transformer \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/sequences --use_ema --output_dir outputs/sequence_transformer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusers_ext.golden_noise.losses import SequenceLoss
from diffusers_ext.golden_noise.settings import SequenceNetworkSettings
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.arguments import GOLDEN_NOISE_GROUPS
from diffusers_ext.training.golden_noise.data import sequence_steps
from diffusers_ext.training.golden_noise.run import NoiseTask, train_network
from diffusers_ext.training.golden_noise.validation import Measure, measure_sequences
from diffusers_ext.training.run.script import one_run_a_folder, run_script
from diffusers_ext.training.run.settings import parse_settings


def parse_args(input_args: Sequence[str] | None = None) -> SequenceNetworkSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(SequenceNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_GROUPS)


def make_loss(
    settings: SequenceNetworkSettings, cache: TextCache, device: torch.device
) -> SequenceLoss:
    """The loss of `--model`; the RNN's has the term on the statistics of its output."""
    return SequenceLoss(cache, device, bool(settings.pooled_text), settings.kl_weight)


def make_measure(settings: SequenceNetworkSettings) -> Measure:
    """The figures of `--model`."""
    return measure_sequences(pooled=bool(settings.pooled_text))


@one_run_a_folder
def main(settings: SequenceNetworkSettings) -> Path:
    """Train and save; returns the output folder."""
    return train_network(
        settings, NoiseTask("noise-sequence", sequence_steps, make_loss, make_measure)
    )


if __name__ == "__main__":
    run_script(parse_args, main, SequenceNetworkSettings)

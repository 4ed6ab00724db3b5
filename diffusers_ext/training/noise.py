"""Train a golden-noise network: from pairs NPNet or GoldenNoiseModel, from sequences a transformer or an RNN.

    accelerate launch -m diffusers_ext.training.noise --model golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/pairs --use_ema --output_dir outputs/golden_noise_model

The flags of sequence networks are shown by `--model transformer --help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.golden_noise.losses import PairLoss, SequenceLoss
from diffusers_ext.golden_noise.settings import NoiseSettings, PairNetworkSettings, SequenceNetworkSettings
from diffusers_ext.training.golden_noise.data import sequence_steps, target_steps
from diffusers_ext.training.golden_noise.result import measure_pairs, measure_sequences
from diffusers_ext.training.golden_noise.run import NoiseTask, train_network
from diffusers_ext.training.run.script import one_run_a_folder, run_script
from diffusers_ext.training.run.settings import parse_settings, read_config
from diffusers_ext.training.run.setup import GOLDEN_NOISE_RUNS

SEQUENCE_NETWORKS = ("transformer", "rnn")
# Only NPNet reads padding like other tokens.
PAIRS = NoiseTask(
    "golden-noise",
    target_steps,
    lambda settings, cache, device: PairLoss(cache, device, masked=settings.model != "npnet"),
    lambda settings: measure_pairs(masked=settings.model != "npnet"),
)
# The RNN's loss has a term on the statistics of its output.
SEQUENCES = NoiseTask(
    "noise-sequence",
    sequence_steps,
    lambda settings, cache, device: SequenceLoss(cache, device, bool(settings.pooled_text), settings.kl_weight),
    lambda settings: measure_sequences(pooled=bool(settings.pooled_text)),
)


def parse_pair_args(input_args: Sequence[str] | None = None) -> PairNetworkSettings:
    """Command line for a network that learns pairs, over the YAML file of `--config`."""
    return parse_settings(PairNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def parse_sequence_args(input_args: Sequence[str] | None = None) -> SequenceNetworkSettings:
    """Command line for a network that learns sequences, over the YAML file of `--config`."""
    return parse_settings(SequenceNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def parse_args(input_args: Sequence[str] | None = None) -> NoiseSettings:
    """Command line for the network of `--model`, or of the YAML file; NPNet without either."""
    input_args = sys.argv[1:] if input_args is None else list(input_args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(input_args)
    model = given.model
    if model is None and given.config is not None:
        model = read_config(given.config).get("model")
    parse = parse_sequence_args if model in SEQUENCE_NETWORKS else parse_pair_args
    return parse(input_args)


@one_run_a_folder
def main(settings: NoiseSettings) -> Path:
    """Train and save; returns the output folder."""
    return train_network(settings, SEQUENCES if settings.model in SEQUENCE_NETWORKS else PAIRS)


if __name__ == "__main__":
    run_script(parse_args, main, NoiseSettings)

"""Train a network that predicts a sequence of ever better noises: a transformer or an RNN.

    accelerate launch training/train_noise_sequence.py --model transformer \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/sequences --use_ema --output_dir outputs/sequence_transformer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.golden_noise.losses import SequenceLoss
from diffusers_ext.golden_noise.text_cache import TextCache
from training.golden_noise_arguments import SEQUENCE_GROUPS
from training.noise_command_line import check_noise_arguments, parse_noise_arguments
from training.noise_data import sequence_steps
from training.noise_networks import check_structure_flags
from training.noise_run import NoiseTask, train_network
from training.noise_validation import Measure, measure_sequences
from training.output_folder import one_run_a_folder
from training.script_entry import run_script


_KL_WEIGHT = 0.01


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_noise_arguments(__doc__, SEQUENCE_GROUPS, ("transformer", "rnn"), input_args)


def make_loss(args: argparse.Namespace, cache: TextCache, device: torch.device) -> SequenceLoss:
    """The loss of `--model`; the RNN's has the term on the statistics of its output."""
    return SequenceLoss(cache, device, bool(args.pooled_text), args.kl_weight)


def make_measure(args: argparse.Namespace) -> Measure:
    """The figures of `--model`."""
    return measure_sequences(pooled=bool(args.pooled_text))


@one_run_a_folder
def main(args: argparse.Namespace) -> Path:
    """Train and save; returns the output folder."""
    check_noise_arguments(args)
    check_structure_flags(args)
    if args.kl_weight is None:
        args.kl_weight = _KL_WEIGHT if args.model == "rnn" else 0.0
    return train_network(args, NoiseTask("noise-sequence", sequence_steps, make_loss, make_measure))


if __name__ == "__main__":
    run_script(parse_args, main)

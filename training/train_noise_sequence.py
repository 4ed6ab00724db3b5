"""Train a network that predicts a sequence of ever better noises: a transformer or an RNN.

    accelerate launch training/train_noise_sequence.py --model transformer \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/sequences --use_ema --output_dir outputs/sequence_transformer
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.golden_noise.settings import SequenceNetworkSettings
from diffusers_ext.training.noise import main
from diffusers_ext.training.noise import parse_sequence_args as parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, SequenceNetworkSettings)

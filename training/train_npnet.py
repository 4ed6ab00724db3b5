"""Train a network from random to golden noise on noise pairs: NPNet or GoldenNoiseModel.

    accelerate launch training/train_npnet.py --model golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/pairs --use_ema --output_dir outputs/golden_noise_model
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.golden_noise.settings import PairNetworkSettings
from diffusers_ext.training.noise import main
from diffusers_ext.training.noise import parse_pair_args as parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, PairNetworkSettings)

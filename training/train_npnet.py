"""Train a network from random to golden noise on noise pairs: NPNet or GoldenNoiseModel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.training.noise import main
from diffusers_ext.training.noise import parse_pair_args as parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main)

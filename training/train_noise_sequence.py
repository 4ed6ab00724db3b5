"""Train a network that predicts a sequence of ever better noises: a transformer or an RNN."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.training.noise import main
from diffusers_ext.training.noise import parse_sequence_args as parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main)

"""`accelerate launch -m diffusers_ext.training.eraser` is `training/train_eraser.py`."""

from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.training.eraser.run import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, EraserSettings)

"""`accelerate launch -m diffusers_ext.training.nullspace` is `training/train_nullspace_dreambooth.py`."""

from diffusers_ext.training.nullspace.run import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main)

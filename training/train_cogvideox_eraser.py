"""Train an eraser that takes one concept out of CogVideoX and leaves the rest, from prompts alone.

    accelerate launch training/train_cogvideox_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model \\
        --target_concept seven --anchor_concept auto --prompts_file prompts.txt \\
        --preserved_concepts_file digits.txt --eraser_rank 32 --learning_rate 5e-3 \\
        --train_batch_size 16 --max_train_steps 400 --output_dir outputs/eraser
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.training.eraser.run import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, EraserSettings)

"""Make noise pairs (`--num_steps 1`) or sequences (more) whose golden noise suits its prompt.

    accelerate launch training/generate_npd.py \\
        --pretrained_model_name_or_path examples/digits/model --prompt_file prompts.txt \\
        --reward examples.digits.rewards:DigitsReward --num_inference_steps 6 \\
        --guidance_scale 1.5 --output_dir outputs/pairs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.golden_noise.settings import PairSettings
from diffusers_ext.training.pairs import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, PairSettings)

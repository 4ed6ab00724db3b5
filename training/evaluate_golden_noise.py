"""Compare golden noise with random noise from the same seeds: is it better, and what does it cost?

    python training/evaluate_golden_noise.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --target_steps 1 \\
        --prompt_file held_out.txt --num_inference_steps 6 --guidance_scale 1.5 \\
        --reward examples.digits.rewards:DigitsReward \\
        --reward examples.digits.rewards:SecondDigitsReward --output_dir outputs/evaluation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.evaluate import GOLDEN_NOISE
from diffusers_ext.training.run.script import run_script

parse_args, main = GOLDEN_NOISE.script(__doc__)

if __name__ == "__main__":
    run_script(parse_args, main, GOLDEN_NOISE.settings_class)

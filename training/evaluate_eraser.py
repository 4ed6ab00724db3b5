"""Compare CogVideoX with and without erasers at the same seeds: what is gone, and what was kept.

    python training/evaluate_eraser.py \\
        --pretrained_model_name_or_path examples/moving_digits/model --eraser outputs/no_seven \\
        --evaluation_prompts prompts.csv --judge examples.moving_digits.judge:MovingDigitsJudge \\
        --concept_aspect digit --num_inference_steps 20 --sampling_guidance_scale 3 \\
        --sampling_batch_size 50 --output_dir outputs/evaluation

The csv has the columns prompt, group and maybe seed. The groups `target` and `preserved` are needed;
further ones, e.g. paraphrases of the target, are reported beside them. For a real model:
`--judge clip --classes dog cat horse "something else" --target_concept dog`, or `--judge nudenet`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.evaluate import ERASURE
from diffusers_ext.training.run.script import run_script

parse_args, main = ERASURE.script(__doc__)

if __name__ == "__main__":
    run_script(parse_args, main, ERASURE.settings_class)

"""Draw pictures of a prompt from golden noise, and from the plain noise of the same seeds.

    python training/sample_golden_noise.py --pretrained_model_name_or_path examples/digits/model \\
        --noise_model outputs/golden_noise_model --prompt "a red nine" --seed 7 \\
        --generate_standard --num_inference_steps 6 --guidance_scale 1.5 --output_dir outputs/samples
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.golden_noise.settings import GoldenSampleSettings
from diffusers_ext.training.golden_noise.rendering import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, GoldenSampleSettings)

"""Teach a Stable Diffusion or SDXL model a new subject without forgetting what it knows.

    accelerate launch training/train_nullspace_dreambooth.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --instance_data_dir pictures --instance_prompt "a photo of sks" \\
        --knowledge_prompts knowledge.txt --resolution 32 --output_dir outputs/subject
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.nullspace.settings import NullSpaceSettings
from diffusers_ext.training.nullspace.run import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main, NullSpaceSettings)

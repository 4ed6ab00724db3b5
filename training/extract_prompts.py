"""Write the captions of a data set as a text file of prompts, one a line, each once.

    python training/extract_prompts.py --dataset_name yuvalkirstain/pickapic_v1 --split train \\
        --caption_column caption --output_dir data --output_filename pickapic_prompts.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.training.golden_noise.data import main, parse_args
from diffusers_ext.training.run.script import run_script

if __name__ == "__main__":
    run_script(parse_args, main)

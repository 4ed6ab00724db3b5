"""Compare a Stable Diffusion or SDXL model with and without LoRAs: what was kept, what was learned.

    python training/evaluate_nullspace.py \\
        --pretrained_model_name_or_path examples/digits/model --lora outputs/subject \\
        --knowledge_prompts knowledge.txt --held_out_prompts held_out.txt \\
        --subject_prompt "a photo of the digit sks" --output_dir outputs/evaluation \\
        --judge examples.digits.judge:DigitsJudge \\
        --subject_judge examples.digits.glyph_judge:GlyphJudge
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.evaluate_forgetting import add_forgetting_arguments, compare_loras
from diffusers_ext.training.run.arguments import NULL_SPACE_GROUPS
from diffusers_ext.training.run.config_file import read_nullbooth_block
from diffusers_ext.training.run.script import run_script
from training.evaluation_scripts import EvaluationScript


SCRIPT = EvaluationScript(
    __doc__,
    add_forgetting_arguments,
    compare_loras,
    ("pretrained_model_name_or_path", "lora", "knowledge_prompts", "output_dir"),
    read_nullbooth_block,
    NULL_SPACE_GROUPS,
)
parse_args, main = SCRIPT.parse_args, SCRIPT.main


if __name__ == "__main__":
    run_script(parse_args, main)

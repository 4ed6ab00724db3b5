"""Compare a Stable Diffusion or SDXL model with and without LoRAs: what was kept, what was learned.

    python training/evaluate_nullspace.py \\
        --pretrained_model_name_or_path examples/digits/model --lora outputs/subject \\
        --knowledge_prompts knowledge.txt --held_out_prompts held_out.txt \\
        --subject_prompt "a photo of the digit sks" --output_dir outputs/evaluation \\
        --judge examples.digits.judge:DigitsJudge \\
        --subject_judge examples.digits.glyph_judge:GlyphJudge
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.command_line.evaluate import FORGETTING
from diffusers_ext.training.run.script import run_script

parse_args, main = FORGETTING.script(__doc__)

if __name__ == "__main__":
    run_script(parse_args, main, FORGETTING.settings_class)

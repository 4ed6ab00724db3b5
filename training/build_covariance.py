"""Measure what a Stable Diffusion or SDXL model already knows, for training in its null space.

    accelerate launch training/build_covariance.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --knowledge_prompts knowledge.txt --output_dir outputs/statistics
"""

from diffusers_ext.nullspace.settings import CollectionSettings
from diffusers_ext.training.nullspace.statistics import main, parse_args
from diffusers_ext.training.run.script import run_script


if __name__ == "__main__":
    run_script(parse_args, main, CollectionSettings)

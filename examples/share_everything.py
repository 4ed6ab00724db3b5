"""Share what you made on the Hub, each with its model card, and load all of it back by its name.

python examples/share_everything.py --user me --lora outputs/subject --license openrail++ \
    --statistics outputs/subject/statistics --trained_on "Five pictures of my dog."
Also `--noise_model`, `--eraser`, `--pairs`. Private unless `--private no`; log in by `hf auth login`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from diffusers_ext import FeatureStatistics, load_eraser, load_noise_model, open_pairs
from diffusers_ext.sharing import push_artifact
from examples.arguments import read_arguments


def main(input_args: list[str] | None = None) -> dict[str, object]:
    """Push what is given, load it from the Hub, and return what was loaded by its name there."""
    args = read_arguments(
        __doc__, input_args, model="stable-diffusion-v1-5/stable-diffusion-v1-5", private="yes",
        video_model="THUDM/CogVideoX-2b", user=str, license=None, trained_on=None, statistics=None,
        lora=None, noise_model=None, pairs=None, eraser=None, instance_prompt=None, reward=None,
        preserved_concepts=(),
    )  # fmt: skip
    made = {"base_model": args.model, "trained_on": args.trained_on}
    drawn = {**made, "pipeline": DiffusionPipeline.load_config(args.model)["_class_name"]}
    subject = {"instance_prompt": args.instance_prompt, "directions": "generalized"}
    kept = {"base_model": args.video_model, "preserved_concepts": args.preserved_concepts}
    facts = {  # for the cards; a fact that neither you nor the files tell stops before the upload
        "statistics": {"base_model": args.model},
        "lora": drawn | subject,
        "noise_model": made,
        "pairs": drawn | {"reward": args.reward},
        "eraser": made | kept,
    }
    pushed = {}
    for name in [name for name in facts if getattr(args, name)]:
        repo_id = pushed[name] = f"{args.user}/{Path(getattr(args, name)).resolve().name}"
        told = facts[name] | {"license": args.license, "private": args.private == "yes"}
        told = {key: value for key, value in told.items() if value not in (None, ())}
        print(push_artifact(getattr(args, name), repo_id, **told))
    read = DiffusionPipeline.from_pretrained
    load = {
        "statistics": FeatureStatistics.from_pretrained,
        "lora": lambda name: read(args.model).load_lora_weights(name),
        "noise_model": load_noise_model,
        "pairs": open_pairs,
        "eraser": lambda name: load_eraser(read(args.video_model), name),
    }
    return {repo_id: load[name](repo_id) for name, repo_id in pushed.items()}


if __name__ == "__main__":
    main()

"""Ask a bundled digits model for every kind of prompt and let the judge read the answers.

python examples/digits/check_model.py --output_dir outputs/digits_check
python examples/digits/check_model.py --model examples/digits_flux2/model --output_dir outputs/digits_flux2_check
python examples/digits/check_model.py --model examples/digits_distilled/model --num_inference_steps 2 \\
    --guidance_scale 1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.hub.saved_pipelines import with_known_dtype
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import HELD_OUT_PAIRS, HELD_OUT_TEMPLATE, TEMPLATES, TRAINING_PAIRS, prompt_pairs
from examples.digits_flux2.pipeline import DigitsFlux2Pipeline

MODEL_DIR = Path(__file__).parent / "model"


def load_pipeline(path: str | Path = MODEL_DIR) -> StableDiffusionPipeline | DigitsFlux2Pipeline:
    """A bundled model in float32, without its progress bar."""
    kind = DiffusionPipeline.load_config(path)["_class_name"]
    pipeline_class = {"Flux2KleinPipeline": DigitsFlux2Pipeline}.get(kind, StableDiffusionPipeline)
    pipeline = pipeline_class.from_pretrained(path, **with_known_dtype({"dtype": torch.float32}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline | DigitsFlux2Pipeline,
    prompts: list[str],
    *,
    seed: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 50,
    negative_prompt: str | None = None,
    description: str = "draw",
) -> list[Image.Image]:
    """One picture per prompt; picture `i` has seed `seed + i` at any batch size."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=description):
        batch = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(batch))
        images += pipeline(
            prompt=batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            **_negative(pipeline, negative_prompt, len(batch)),
        ).images
    return images


def _negative(
    pipeline: StableDiffusionPipeline | DigitsFlux2Pipeline, prompt: str | None, count: int
) -> dict[str, Any]:
    """Arguments of the call; FLUX.2 takes negative prompts encoded."""
    if prompt is None:
        return {}
    if isinstance(pipeline, DigitsFlux2Pipeline):
        return {"negative_prompt_embeds": pipeline.encode_prompt([prompt] * count)[0]}
    return {"negative_prompt": [prompt] * count}


def make_sheet(images: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns`."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width * zoom, rows * height * zoom))
    for index, image in enumerate(images):
        position = (index % columns * width * zoom, index // columns * height * zoom)
        sheet.paste(image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST), position)
    return sheet


def main(input_args: list[str] | None = None) -> dict[str, float]:
    """Print and write the share of pictures that show the digit and the colour asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digits_check"))
    args = parser.parse_args(input_args)
    pipeline, judge = load_pipeline(args.model), DigitsJudge()
    all_pairs = (*TRAINING_PAIRS, *HELD_OUT_PAIRS)
    groups = {
        "trained": [p for template in TEMPLATES for p in prompt_pairs(template, TRAINING_PAIRS)],
        "held_out_pairs": [p for template in TEMPLATES for p in prompt_pairs(template, HELD_OUT_PAIRS)],
        "held_out_template": prompt_pairs(HELD_OUT_TEMPLATE, all_pairs),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shares = {}
    for name, prompts in groups.items():
        asked = [prompts[i % len(prompts)] for i in range(args.samples)]
        images = draw(
            pipeline, asked, seed=1_000_000, num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale, description=name,
        )  # fmt: skip
        shares[name] = float(judge.correct(images, asked).mean())
        make_sheet(images[:100], 20).save(args.output_dir / f"{name}.png")
    (args.output_dir / "shares.json").write_text(json.dumps(shares, indent=2) + "\n")
    print(json.dumps(shares, indent=2))
    return shares


if __name__ == "__main__":
    main()

"""Teach the digits model a new glyph twice, plainly and in the null space, and show what each kept.

python examples/demo_new_glyph.py --output_dir outputs/demo
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.paired_figures import pixel_drift
from examples.digits.check_model import draw
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import (
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPLATE,
    TEMPLATES,
    TRAINING_PAIRS,
    prompt_pairs,
)
from examples.digits.subjects import (
    INSTANCE_PROMPTS,
    NULL_SPACE_FLAGS,
    PLAIN_FLAGS,
    glyph_share,
    load_with_loras,
    train_subject,
)


GLYPH = "triangle"
KNOWN = prompt_pairs(TEMPLATES[0], TRAINING_PAIRS)
HELD_OUT = prompt_pairs(TEMPLATES[0], HELD_OUT_PAIRS) + prompt_pairs(
    HELD_OUT_TEMPLATE, TRAINING_PAIRS
)
_SHOWN = 16  # pictures per row of the sheet
_ZOOM = 2


def examine(loras: list[Path], judges: tuple[DigitsJudge, DigitsJudge]) -> dict:
    """Pictures and reading shares of the model with `loras`, always from the same seeds."""
    digits, glyphs = judges
    pipeline = load_with_loras(loras)
    share, pictures = glyph_share(pipeline, GLYPH, glyphs, count=40, seed=7_000)
    known = draw(pipeline, KNOWN, seed=8_000, description="draw old digits")
    held_out = draw(pipeline, HELD_OUT, seed=9_000, description="draw held-out prompts")
    return {
        "glyph": share,
        "known": float(digits.correct(known, KNOWN).mean()),
        "held_out": float(digits.correct(held_out, HELD_OUT).mean()),
        "pictures": {"glyph": pictures, "known": known, "held_out": held_out},
    }


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Pictures as `(n, 3, 32, 32)` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def picture_sheet(results: dict[str, dict]) -> Image.Image:
    """One block per model: the glyph's prompt, old digits, held-out pairs; the same seeds below."""
    font = ImageFont.load_default(15)
    size, margin, label = 32 * _ZOOM, 190, 26
    rows = [("glyph", f'"{INSTANCE_PROMPTS[GLYPH]}"'), ("known", "old digits"),
            ("held_out", "unseen pairs")]  # fmt: skip
    block = label + len(rows) * (size + 4) + 10
    sheet = Image.new("RGB", (margin + _SHOWN * size, block * len(results) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, result) in enumerate(results.items()):
        top = number * block + 6
        pen.text((8, top), name, fill="black", font=font)
        for line, (group, title) in enumerate(rows):
            y = top + label + line * (size + 4)
            pen.multiline_text(
                (8, y + 12), title.replace("the ", "the\n", 1), fill="#555", font=font
            )
            step = 2 if group == "known" else 1
            for index, image in enumerate(result["pictures"][group][::step][:_SHOWN]):
                enlarged = image.resize((size, size), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (margin + index * size, y))
    return sheet


def run(output_dir: Path) -> str:
    """Train both, measure all three models, write the sheet; returns the table."""
    output_dir.mkdir(parents=True, exist_ok=True)
    judges, times = (DigitsJudge(), DigitsJudge(glyphs=True)), {}
    loras = {"base model": []}
    for name, flags in (
        ("plain LoRA", (*PLAIN_FLAGS, "--learning_rate", "1e-2")),
        ("null-space LoRA", NULL_SPACE_FLAGS),
    ):
        started = time.perf_counter()
        loras[name] = [train_subject(output_dir, name.replace(" ", "_"), GLYPH, flags)]
        times[name] = time.perf_counter() - started
    results = {name: examine(folders, judges) for name, folders in loras.items()}
    rows, known = [], to_pixels(results["base model"]["pictures"]["known"])
    for name, result in results.items():
        moved = pixel_drift(known, to_pixels(result["pictures"]["known"])).mean().item()
        shares = [f"{result[key]:.2f}" for key in ("glyph", "known", "held_out")]
        rows.append([name, *shares, f"{moved:.4f}", f"{times.get(name, 0):.0f} s"])
    header = ["", "new glyph", "old digits", "held-out prompts", "pixel drift", "training"]
    text = table(header, rows)
    picture_sheet(results).save(output_dir / "sheet.png")
    write_atomically(output_dir / "table.md", text + "\n")
    return text


def main(input_args: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args(input_args)
    print(f"\n{run(args.output_dir)}\n\nPictures: {args.output_dir / 'sheet.png'}")


if __name__ == "__main__":
    main()

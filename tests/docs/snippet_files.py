"""The files that the commands of the pages name, in the current folder."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from tests.docs.snippet_models import BASES, save_random_eraser, save_subject, stable_diffusion
from tests.docs.snippets import ROOT
from tests.golden_noise.npnet_fixture import nested, official_weights

PROMPTS = ("a photo of a dog", "a dog runs", "the red dog", "a dog in the sea")
OTHERS = ("a photo of a cat", "a red fox")


def write_files(folder: Path) -> None:
    """Pictures, prompts, tables, a YAML file, a LoRA of Stable Diffusion; and the scripts."""
    for name in ("training", "examples", "diffusers_ext"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32), (80 * index, 40, 90)).save(folder / "photos" / f"{index}.png")
    for name in ("prompts", "knowledge", "held_out"):
        lines = PROMPTS if name == "prompts" else OTHERS
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "prompts.csv").write_text("\n".join(["caption", *PROMPTS]) + "\n")
    (folder / "kept.txt").write_text("cat\nhorse\n")
    torch.save(nested(official_weights("sdxl")), folder / "sdxl.pth")
    rows = [f'"{prompt}",target' for prompt in PROMPTS] + [f'"{OTHERS[0]}",preserved']
    (folder / "evaluation.csv").write_text("\n".join(["prompt,group", *rows]) + "\n")
    (folder / "ring-a-bell.csv").write_text(f"adv_prompt,evaluation_seed\n{PROMPTS[0]},7\n")
    (folder / "dog.yaml").write_text(
        f"pretrained_model_name_or_path: {BASES['sd']}\nknowledge_prompts: knowledge.txt\n"
        "instance_data_dir: photos\ninstance_prompt: a photo of sks dog\noutput_dir: outputs/dog\n"
    )
    save_random_eraser(folder / "legacy_folder", format="legacy")
    save_subject(folder / "one", stable_diffusion())
    (folder / "one" / "pytorch_lora_weights.safetensors").rename(folder / "some_lora.safetensors")

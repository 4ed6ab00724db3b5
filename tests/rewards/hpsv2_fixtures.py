"""The official numbers, and the tiny checkpoint and tokenizer that they were made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from examples.digits.small_tokenizers import byte_pair_tokenizer
from tests.filled_weights import fill

FOLDER = Path(__file__).parents[1] / "fixtures" / "hpsv2"


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


CASES = read_json("cases.json")
PROMPTS = [prompt["text"] for prompt in CASES["prompts"]]


def official_tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "hpsv2.safetensors")


def tiny_checkpoint() -> dict[str, torch.Tensor]:
    """The state dict under open_clip's names."""
    return fill(read_json("keys.json")["keys"])


def tiny_config() -> CLIPConfig:
    facts = read_json("open_clip_to_transformers.json")["hf_config"]
    tiny = facts["tiny"]
    shared = {
        **{key: facts[key] for key in ("hidden_act", "layer_norm_eps")},
        "projection_dim": tiny["projection_dim"],
    }
    ids = {key.removeprefix("text."): facts[key] for key in facts if key.startswith("text.")}
    return CLIPConfig(
        text_config={**tiny["text"], **shared, **ids},
        vision_config={**tiny["vision"], **shared},
        projection_dim=tiny["projection_dim"],
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as far as the fixture's prompts need it, with the real ids."""
    merges = read_json("merges.json")
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    vocabulary |= {first + second: index for first, second, index in merges}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    pairs = [(first, second) for first, second, _ in merges]
    return byte_pair_tokenizer(CLIPTokenizer, vocabulary, pairs, model_max_length=77)


def picture(name: str) -> Image.Image:
    """A picture of the fixture, drawn by its rule."""
    facts = CASES["images"][name]
    height, width = facts["height"], facts["width"]
    rows, columns = np.mgrid[:height, :width]
    across, down = 255 * columns // (width - 1), 255 * rows // (height - 1)
    diagonal = 255 * (columns + rows) // (width + height - 2)
    channels = {"RGB": [across, down, diagonal], "RGBA": [across, down, diagonal, 255 - across], "L": [diagonal]}[
        facts["mode"]
    ]
    pixels = np.stack(channels, axis=-1)
    pixels += np.random.RandomState(facts["seed"]).randint(-40, 41, size=pixels.shape)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts["sha256_of_uint8_bytes"]
    return Image.fromarray(pixels[..., 0] if facts["mode"] == "L" else pixels)


def pictures() -> list[Image.Image]:
    """In the order of the fixture's features."""
    made = []
    for name in CASES["image_feature_order"]:
        image = picture(name.removesuffix("_as_rgb"))
        made.append(image.convert("RGB") if name.endswith("_as_rgb") else image)
    return made

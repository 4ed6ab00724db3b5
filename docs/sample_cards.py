"""Write the sample cards in `hub_cards/`: what each kind of artifact looks like on the Hub.

    python docs/sample_cards.py

All that they tell of models, pictures and figures is made up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file

from diffusers_ext import __version__
from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import artifact_card

_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_NETWORK = {
    "pipeline": "GoldenNoiseXLPipeline",
    "parameters": 1_600_000,
    "latent_shape": (4, 128, 96),
    "any_size": True,
    "text_embed_dim": 2048,
}
# What only the cards of one kind tell, by kind.
FACTS: dict[str, dict[str, Any]] = {
    "null_space_lora": {
        "instance_prompt": "a photo of sks dog",
        "pipeline": "StableDiffusionXLPipeline",
        "directions": "generalized",
        "kohya_file": "comfyui_a1111_kohya.safetensors",
        "rank": 1,
        "statistics": True,
    },
    "knowledge_edit": {
        "targets": ["lawn mower", "in the style of Kelly"],
        "anchors": ["bicycle", ""],
        "pipeline": "StableDiffusionXLPipeline",
        "kohya_file": "comfyui_a1111_kohya.safetensors",
        "rank": 24,
    },
    "subject_pipeline": {
        "instance_prompt": "a photo of sks dog",
        "pipeline": "StableDiffusionXLPipeline",
        "statistics": True,
    },
    "feature_statistics": {
        "pipeline": "StableDiffusionPipeline",
        "num_prompts": 1234,
        "example_prompts": ["a red fox", ""],
        "layers": 32,
        "megabytes": 2.36,
    },
    "npnet": {**_NETWORK, "network": "NPNet", "any_size": False},
    "golden_noise_model": {**_NETWORK, "network": "GoldenNoiseModel"},
    "noise_sequence_transformer": {**_NETWORK, "network": "NoiseSequenceTransformer"},
    "noise_sequence_rnn": {**_NETWORK, "network": "NoiseSequenceRNN", "latent_shape": ()},
    "golden_noise_pipeline": {
        "pipeline": "GoldenNoiseXLPipeline",
        "plain_pipeline": "StableDiffusionXLPipeline",
        "network": "NPNet",
        "parameters": 9_000_000,
    },
    "eraser": {
        "concept": "dog",
        "anchor_concept": "cat",
        "preserved_concepts": ["horse", "cow"],
        "pipeline": "CogVideoXPipeline",
        "rank": 128,
        "parameters": 33_164_544,
    },
    "pair_data_set": {
        "num_pairs": 1200,
        "num_rejected": 300,
        "num_steps": 5,
        "latent_shape": (4, 128, 96),
        "pipeline": "StableDiffusionXLPipeline",
        "reward": "hpsv2 2.1",
    },
}

_SUBJECT: dict[str, Any] = {
    "base": _SDXL,
    "licence": Licence("openrail++"),
    "trained_on": "Six photographs of one dog, each in another place.",
    "settings": {"learning_rate": 1e-3, "max_train_steps": 600, "resolution": 1024},
    "results": [
        Measured("50 pictures of the subject", "subject shown", 0.94),
        Measured("200 other prompts", "pixel drift", 0.0123, notes="5 seeds, 0.010 to 0.014"),
    ],
    "widget": [("a photo of sks dog on the beach", "pictures/0.png")],
}
_REFINED: dict[str, Any] = {
    "base": _SDXL,
    "licence": Licence("apache-2.0"),
    "trained_on": "20,000 pairs of random and golden noise, kept where HPSv2.1 prefers the golden one.",
    "settings": {"learning_rate": 1e-4, "batch_size": 64, "epochs": 30},
    "results": [Measured("200 held-out prompts", "win rate", 0.71, notes="95 % interval 0.66 to 0.76")],
    "widget": [("a red fox in the snow", "pictures/0.png")],
}
# What the cards of a kind tell besides its own facts.
_COMMON: dict[str, dict[str, Any]] = {
    "null_space_lora": _SUBJECT,
    "knowledge_edit": {
        **_SUBJECT,
        "trained_on": "Nothing was trained: solved for in 41.0 s from the weights and what they read for 112 prompts "
        "to edit and 2,400 to keep.",
        "settings": {"preserve_weight": 1.0, "eps": 1e-4, "hard": "False"},
        "results": [
            Measured("400 preserved prompts", "predicted drift of a layer's outputs, the worst", 0.004),
            Measured("100 prompts with a target", "target read", 0.02, notes="0.97 without it"),
        ],
        "widget": [],
    },
    "subject_pipeline": _SUBJECT,
    "feature_statistics": {
        **_SUBJECT,
        "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "licence": Licence("creativeml-openrail-m"),
        "trained_on": "What 32 linear layers read for 1,234 prompts.",
        "settings": {"sub_phrases": True, "dtype": "float64"},
        "results": [],
        "widget": [],
        "example_prompts": ["a red fox in the snow", "a wooden table with a vase"],
    },
    "eraser": {
        "base": "zai-org/CogVideoX-5b",
        "licence": Licence("other", "cogvideox-license", "https://huggingface.co/zai-org/CogVideoX-5b"),
        "trained_on": "40 prompts with dogs, in each of which a cat takes the place of the dog.",
        "settings": {"learning_rate": 5e-4, "max_train_steps": 500},
        "results": [
            Measured("100 prompts for dogs", "clips that show a dog", 0.06, notes="0.97 without it"),
            Measured("100 other prompts", "clips that show what was asked", 0.93),
        ],
        "widget": [("a dog runs along the beach", "clips/0.mp4")],
    },
    "pair_data_set": {
        **_REFINED,
        "trained_on": "1,500 random noises, one for each prompt, each re-denoised five times.",
        "settings": {"redenoise_steps": 10, "w1": 5.5, "w2": 1.0, "margin": 0.1},
        "results": [Measured("the prompts of this set", "win rate", 0.8, notes="before the filter")],
        "widget": [],
    },
}


_NAMES = {"null_space_lora": "sks-dog-lora", "subject_pipeline": "sks-dog", "eraser": "no-dogs"}


def sample_card(kind: str) -> str:
    """The card of one made-up artifact."""
    facts = {**FACTS[kind], **_COMMON.get(kind, _REFINED), "version": __version__}
    return str(artifact_card(kind, f"you/{_NAMES.get(kind, kind).replace('_', '-')}", **facts))


def main() -> None:
    """Write all cards anew."""
    for kind in FACTS:
        path = ROOT / "hub_cards" / f"{kind}.md"
        path.write_text(sample_card(kind), encoding="utf-8")


if __name__ == "__main__":
    main()

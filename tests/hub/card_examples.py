"""Facts for a card of every kind."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCard, ModelCard

from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import artifact_card


BASE = "somebody/base"
COMMON: dict[str, Any] = {
    "base": BASE,
    "licence": Licence("other", "openrail++", "https://example.org/licence"),
    "trained_on": "Six pictures of one dog.",
    "settings": {"learning_rate": 1e-3, "max_train_steps": 600},
    "results": [
        Measured("held-out prompts", "pixel drift", 0.01234, notes="5 seeds, 0.010 to 0.014"),
        Measured("held-out prompts", "win rate", 0.75, name="win rate at scale 1"),
        Measured("dog pictures", "win rate", 1),
    ],
    "widget": [("a photo of sks dog", "validation/dog 1.png"), ("a dog runs", "clips/dog.mp4")],
    "version": "1.2.3",
}
_NETWORK = {
    "pipeline": "GoldenNoiseXLPipeline",
    "parameters": 1_600_000,
    "latent_shape": (4, 128, 96),
    "any_size": True,
    "text_embed_dim": 2048,
}
FACTS: dict[str, dict[str, Any]] = {
    "null_space_lora": {
        "instance_prompt": "a photo of sks dog",
        "pipeline": "StableDiffusionXLPipeline",
        "directions": "generalized",
        "kohya_file": "comfyui_a1111_kohya.safetensors",
        "rank": 1,
        "statistics": True,
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
# What else the facts of a kind may say, and the templates answer to.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in FACTS),
    *((kind, {"base": "my_folder", "results": (), "settings": {}, "widget": ()}) for kind in FACTS),
    *((kind, {"subfolder": "a folder/inner"}) for kind in FACTS),
    *(("null_space_lora", {"directions": d}) for d in ("null", "soft", "plain")),
    ("null_space_lora", {"statistics": False, "pipeline": "StableDiffusionPipeline"}),
    ("subject_pipeline", {"statistics": False, "pipeline": "StableDiffusionPipeline"}),
    ("subject_pipeline", {"instance_prompt": ""}),
    ("subject_pipeline", {"instance_prompt": None, "statistics": False}),
    ("feature_statistics", {"example_prompts": []}),
    ("npnet", {"latent_shape": ()}),
    ("golden_noise_pipeline", {"network": None, "parameters": 0}),
    ("eraser", {"anchor_concept": "", "preserved_concepts": []}),
    ("pair_data_set", {"reward": "", "num_steps": 1}),
]


def card_of(kind: str, **changes: Any) -> ModelCard | DatasetCard:
    """The card of one kind with some facts changed."""
    return artifact_card(kind, f"user/my-{kind}", **{**COMMON, **FACTS[kind], **changes})

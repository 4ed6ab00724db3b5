"""Cards of every kind, with facts that change one at a time."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCard, ModelCard

from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import artifact_card
from docs.sample_cards import FACTS

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

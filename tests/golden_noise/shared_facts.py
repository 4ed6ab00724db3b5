"""Facts for the cards of what tests share, and a base model that cards refer to."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from diffusers_ext.hub import Measured

RESULT = Measured("held-out prompts", "relative error", 0.25, notes="8 pairs")
# What nobody can know but the user.
NETWORK_FACTS: dict[str, Any] = {
    "base_model": "somebody/base",
    "license": "apache-2.0",
    "trained_on": "900 noise pairs",
    "pipeline": "GoldenNoisePipeline",
}


def upload_base(repo_id: str = "tester/base", class_name: str = "StableDiffusionPipeline") -> str:
    """A base model as far as cards read it, its class and its licence; returns its name."""
    files = {
        "model_index.json": json.dumps({"_class_name": class_name}),
        "README.md": "---\nlicense: openrail++\n---\nA base.\n",
    }
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
    api.create_commit(repo_id, operations, commit_message="Upload a base model")
    return repo_id

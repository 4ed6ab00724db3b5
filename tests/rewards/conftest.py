"""Folders as a user has them: HPSv2's checkpoint with a tokenizer, a CLIP model with everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusers_ext.rewards import HPSv2Reward
from tests.rewards.hpsv2_fixtures import clip_tokenizer, tiny_checkpoint, tiny_config
from tests.tiny_clip import save_tiny_clip


@pytest.fixture(scope="session")
def hpsv2_folder(tmp_path_factory) -> Path:
    """Both versions; v2.1 is v2.0 with another projection."""
    folder = tmp_path_factory.mktemp("hpsv2")
    weights = tiny_checkpoint()
    torch.save({"epoch": 3, "state_dict": weights}, folder / "HPS_v2_compressed.pt")
    newer = {**weights, "visual.proj": weights["visual.proj"].flip(0)}
    torch.save({"state_dict": newer}, folder / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_hpsv2(hpsv2_folder):
    """`HPSv2Reward` of the fixture's tiny checkpoint."""

    def load(**arguments):
        arguments = {"version": "v2.0", "local_files_only": True, **arguments}
        return HPSv2Reward.from_pretrained(hpsv2_folder, config=tiny_config(), **arguments)

    return load


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP model with tokenizer and preprocessing."""
    return save_tiny_clip(tmp_path_factory.mktemp("tiny-clip"))

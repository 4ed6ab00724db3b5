from __future__ import annotations

import torch

from diffusers_ext.rewards import CLIPScoreReward
from tests.rewards.hpsv2_fixtures import pictures


def test_the_cosine_counts_in_hundredths_from_zero():
    found = CLIPScoreReward._from_cosines(None, torch.tensor([1.0, 0.25, 0.0, -0.3]))
    assert found.tolist() == [100.0, 25.0, 0.0, 0.0]


def test_scores_are_those_of_the_features(clip_folder):
    reward = CLIPScoreReward.from_pretrained(clip_folder)
    images, prompts = pictures(), ["a red seven", "two", "a red seven", "three"]
    images, prompts = images * 2, prompts + ["blue", "green", "nine", "one"]
    cosines = (reward.image_features(images) * reward.text_features(prompts)).sum(1)
    found = reward.score(images, prompts)
    assert torch.allclose(found, 100 * cosines.clamp(min=0), atol=1e-3, rtol=0)
    assert found.max() > 0


def test_the_version_is_the_model(clip_folder):
    reward = CLIPScoreReward.from_pretrained(clip_folder)
    assert (reward.name, reward.version) == ("clip_score", clip_folder.name)
    assert CLIPScoreReward.from_pretrained(clip_folder, version="mine").version == "mine"

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from diffusers_ext.rewards import PickScoreReward
from tests.rewards.hpsv2_fixtures import official_tensors, pictures


def test_scores_and_preference_are_those_of_the_recipe():
    tensors = official_tensors()
    cosines = tensors["image_features"][:2] @ tensors["text_features"][2]
    reward = SimpleNamespace(model=SimpleNamespace(logit_scale=torch.tensor(math.log(100))))
    scores = PickScoreReward._from_cosines(reward, cosines)
    assert torch.allclose(scores, torch.tensor([1.3120, 2.9555]), atol=1e-3)
    assert torch.allclose(scores.softmax(0), torch.tensor([0.1620, 0.8380]), atol=1e-3)


@pytest.mark.parametrize("logit_scale", [3.0, 0.5])
def test_the_models_own_scale_is_used(clip_folder, logit_scale):
    reward = PickScoreReward.from_pretrained(clip_folder)
    assert reward.model.logit_scale.item() == 3.0
    reward.model.logit_scale.data.fill_(logit_scale)
    images, prompts = pictures(), ["a red seven", "two", "a red seven", "three"]
    cosines = (reward.image_features(images) * reward.text_features(prompts)).sum(1)
    expected = math.exp(logit_scale) * cosines
    assert torch.allclose(reward.score(images, prompts), expected, atol=1e-4, rtol=0)


def test_name_and_version(clip_folder):
    reward = PickScoreReward.from_pretrained(clip_folder)
    assert (reward.name, reward.version) == ("pickscore", "v1")
    assert PickScoreReward.from_pretrained(clip_folder, version="mine").version == "mine"

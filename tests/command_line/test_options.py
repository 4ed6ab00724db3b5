from __future__ import annotations

import argparse

import pytest

from diffusers_ext.command_line.options import load_features, load_rewards
from diffusers_ext.rewards import CLIPScoreReward, PickScoreReward
from tests.tiny_clip import save_tiny_clip


def namespace(**values) -> argparse.Namespace:
    given = {"reward": [], "reward_model": [], "reward_version": [], "dino": None, "clip": None}
    return argparse.Namespace(**given | values)


def test_rewards_get_their_models_and_versions(tmp_path):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    args = namespace(
        reward=["clip_score", "pickscore"],
        reward_model=[f"pickscore={clip}", f"clip_score={clip}"],
        reward_version=["clip_score=mine"],
    )
    first, second = load_rewards(args, "cpu")
    assert (type(first), first.version) == (CLIPScoreReward, "mine")
    assert type(second) is PickScoreReward
    (only,) = load_rewards(namespace(reward=["clip_score"], reward_model=[clip]), "cpu")
    assert only.version == "clip"


@pytest.mark.parametrize(
    ("rewards", "entry"),
    [
        (["clip_score", "pickscore"], "somewhere"),
        (["clip_score", "pickscore"], "hpsv2=somewhere"),
        (["clip_score", "pickscore"], "clip_score="),
    ],
)
def test_a_model_for_no_reward_is_refused(rewards, entry):
    message = "`reward_model` must be REWARD=value, once for each of .*, got '.*'"
    with pytest.raises(ValueError, match=message):
        load_rewards(namespace(reward=rewards, reward_model=[entry]), "cpu")


def test_a_model_given_twice_is_refused():
    entries = ["clip_score=a", "clip_score=b"]
    with pytest.raises(ValueError, match="once for each"):
        load_rewards(namespace(reward=["clip_score"], reward_model=entries), "cpu")


def test_features_of_clip_also_score(tmp_path):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    found = load_features(namespace(clip=clip), "cpu")
    assert found["scorer"] == found["features"].text_similarity
    assert load_features(namespace(), "cpu") == {}


def test_values_belong_to_their_reward():
    args = namespace(reward=["tests.training.stub_rewards:Brightness"], reward_model=["/a/rank=8"])
    with pytest.raises(ValueError, match=r"must be one of .* to take \['model'\]"):
        load_rewards(args, "cpu")

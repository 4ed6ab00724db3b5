"""Rewards: how well a picture fits its prompt, one `score(images, prompts)` for all."""

from diffusers_ext.rewards.clip import CLIPScoreReward, PickScoreReward
from diffusers_ext.rewards.hpsv2 import HPSv2Reward
from diffusers_ext.rewards.reward import Reward, checked_scores

__all__ = ["CLIPScoreReward", "HPSv2Reward", "PickScoreReward", "Reward", "checked_scores"]

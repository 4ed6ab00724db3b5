"""Feature models and rewards that a command line names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from diffusers_ext.rewards import Reward


REWARDS = ("hpsv2", "pickscore", "clip_score")


def add_feature_arguments(parser: argparse._ArgumentGroup, purpose: str) -> None:
    """DINOv2 or CLIP."""
    parser.add_argument("--dino", help=f"DINOv2 for {purpose}: folder or Hub name")
    parser.add_argument("--clip", help=f"CLIP for {purpose}, where there is no DINOv2")


def load_features(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`features` of `--dino`, else of `--clip`; `scorer`, how well pictures fit prompts, of `--clip`."""
    from diffusers_ext.evaluation.features import CLIPFeatures, DINOv2Features

    found: dict[str, Any] = {}
    if args.clip is not None:
        found["features"] = CLIPFeatures.from_pretrained(args.clip, device=device)
        found["scorer"] = found["features"].text_similarity
    if args.dino is not None:
        found["features"] = DINOv2Features.from_pretrained(args.dino, device=device)
    return found


def load_rewards(args: argparse.Namespace, device: torch.device) -> list[Reward]:
    """The rewards of `--reward`, in their order."""
    from diffusers_ext.rewards import CLIPScoreReward, HPSv2Reward, PickScoreReward

    classes = {kind.name: kind for kind in (HPSv2Reward, PickScoreReward, CLIPScoreReward)}
    models = _by_reward(args.reward, args.reward_model, "reward_model")
    versions = _by_reward(args.reward, args.reward_version, "reward_version")
    rewards = []
    for name in args.reward:
        source = (models[name],) if name in models else ()
        given = {"version": versions[name]} if name in versions else {}
        rewards.append(classes[name].from_pretrained(*source, device=device, **given))
    return rewards


def _by_reward(rewards: list[str], entries: list[str], name: str) -> dict[str, str]:
    """`{reward: value}` of a repeated `REWARD=value`; a single reward needs no `REWARD=`."""
    found: dict[str, str] = {}
    for entry in entries:
        reward, equals, value = entry.partition("=")
        if reward not in rewards and len(rewards) == 1:
            reward, equals, value = rewards[0], "=", entry
        if not (equals and value) or reward not in rewards or reward in found:
            raise ValueError(
                f"`{name}` must be REWARD=value, once for each of {rewards}, got {entry!r}."
            )
        found[reward] = value
    return found

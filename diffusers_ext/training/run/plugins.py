"""Judges and rewards that a command line names; they live in `diffusers_ext.evaluation.plugins`."""

from __future__ import annotations

from diffusers_ext.evaluation.plugins import REWARDS, load_judge, load_reward


__all__ = ["REWARDS", "load_judge", "load_reward"]

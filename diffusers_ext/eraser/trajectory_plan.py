"""Which runs the frozen model makes, and which of their points are kept: a function of the seed alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffusers_ext.core.seeds import stream_generator, stream_seed


class TrajectoryPlan(NamedTuple):
    """One run of one part of the samples."""

    index: int  # in its part
    prompt: int  # index of its prompt
    seed: int  # of its noise
    steps: tuple[int, ...]  # whose points are kept, ascending
    empty: tuple[bool, ...]  # points at which the empty prompt's velocity stands for the prompt's


def plan_trajectories(
    part: str,
    num_trajectories: int,
    num_prompts: int,
    num_steps: int,
    *,
    points_per_trajectory: int | None,
    empty_share: float,
    seed: int,
) -> list[TrajectoryPlan]:
    """Plan the runs of one part; every prompt comes up equally often, up to one run.

    The kept steps of a run are equally spaced from a random first one: all steps are kept equally
    often, none twice.

    Args:
        part: `"target"` or `"preserved"`.
        num_trajectories: runs.
        num_prompts: of the part.
        num_steps: of a run.
        points_per_trajectory: kept of each run; `None` keeps all.
        empty_share: of the kept points, for the empty prompt; in [0, 1].
        seed: of all samples.

    Returns:
        One plan per run.
    """
    prompts: list[int] = []
    while len(prompts) < num_trajectories:
        prompts += _shuffled(num_prompts, seed, f"{part} prompts", len(prompts))
    count = num_steps if points_per_trajectory is None else points_per_trajectory
    plans = []
    for index in range(num_trajectories):
        generator = stream_generator(seed, f"{part} points", index)
        start, rest = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        steps = tuple(int((position + start) * num_steps / count) for position in range(count))
        num_empty = int(count * empty_share + rest)
        chosen = set(torch.randperm(count, generator=generator)[:num_empty].tolist())
        empty = tuple(position in chosen for position in range(count))
        run_seed = stream_seed(seed, part, index)
        plans.append(TrajectoryPlan(index, prompts[index], run_seed, steps, empty))
    return plans


def _shuffled(count: int, seed: int, stream: str, index: int) -> list[int]:
    return torch.randperm(count, generator=stream_generator(seed, stream, index)).tolist()

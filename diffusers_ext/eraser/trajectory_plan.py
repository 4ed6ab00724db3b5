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
    often, none twice. `points_per_trajectory` of each are kept, all when `None`; of these
    `empty_share`, in [0, 1], are for the empty prompt.
    """
    prompts: list[int] = []
    while len(prompts) < num_trajectories:
        generator = stream_generator(seed, f"{part} prompts", len(prompts))
        prompts += torch.randperm(num_prompts, generator=generator).tolist()
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

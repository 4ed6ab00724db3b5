from __future__ import annotations

from collections import Counter

import pytest

from diffusers_ext.core.seeds import stream_seed
from diffusers_ext.eraser.teacher.runs import plan_trajectories


def plan(num_trajectories=60, num_prompts=8, num_steps=20, **changes):
    options = {"points_per_trajectory": 5, "empty_share": 0.2, "seed": 0}
    return plan_trajectories("preserved", num_trajectories, num_prompts, num_steps, **{**options, **changes})


def test_every_prompt_comes_up_equally_often():
    counts = Counter(run.prompt for run in plan())
    assert set(counts) == set(range(8))
    assert max(counts.values()) - min(counts.values()) <= 1
    few = plan(num_trajectories=5)
    assert len({run.prompt for run in few}) == 5


def test_a_longer_plan_starts_with_the_shorter_one():
    assert plan()[:10] == plan(num_trajectories=10)


def test_kept_steps_are_distinct_ordered_and_equally_likely():
    runs = plan(num_trajectories=2000)
    for run in runs:
        assert sorted(set(run.steps)) == list(run.steps)
        assert len(run.steps) == 5
    counts = Counter(step for run in runs for step in run.steps)
    assert set(counts) == set(range(20))
    # 2000 draws of 1 in 4: a standard deviation of 19.
    assert all(abs(count - 500) < 100 for count in counts.values())


@pytest.mark.parametrize("points", [None, 20])
def test_all_steps_can_be_kept(points):
    assert {run.steps for run in plan(points_per_trajectory=points)} == {tuple(range(20))}


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.25, 150), (1.0, 600)])
def test_the_share_of_the_empty_prompt(share, wanted):
    found = sum(sum(run.empty) for run in plan(points_per_trajectory=10, empty_share=share))
    assert abs(found - wanted) <= 30 * (0 < share < 1)  # 2.5 of 10: 2 or 3 a run


def test_runs_of_other_seeds_and_parts_share_no_noise():
    seeds = {
        stream_seed(seed, part, index) for seed in range(5) for part in ("target", "preserved") for index in range(20)
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert plan(seed=1) != plan()

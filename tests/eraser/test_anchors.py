from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.concepts import anchor_distances
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser

SHAPE = (3, 4, 4, 4)


def embeds(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, 12, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def distances(pipeline, target, candidates, **settings):
    return anchor_distances(
        CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16),
        pipeline.scheduler,
        target,
        candidates,
        torch.zeros(12, TEXT_WIDTH),
        latent_shape=SHAPE,
        **{"num_inference_steps": 3, "guidance_scale": 2.0, **settings},
    )


def test_the_nearer_candidate_is_nearer_and_the_concept_itself_at_zero():
    target, away = embeds(2, seed=0), embeds(2, seed=1)
    candidates = torch.stack([target, target + 0.05 * away, target + away])
    found = distances(tiny_video_pipeline(), target, candidates)
    assert found[0] < 1e-10 < found[1] < found[2]


def test_erasers_play_no_part_and_come_back():
    target, candidates = embeds(2, seed=0), embeds(3, 2, seed=1)
    plain, erased = tiny_video_pipeline(), tiny_video_pipeline()
    add_random_eraser(erased.transformer, "seven", 3)
    erased.transformer.train()
    before = {name: value.clone() for name, value in erased.transformer.state_dict().items()}
    assert torch.equal(distances(erased, target, candidates), distances(plain, target, candidates))
    assert all(torch.equal(before[n], v) for n, v in erased.transformer.state_dict().items())
    assert erased.transformer.training


def test_the_seed_decides_the_runs():
    target, candidates = embeds(1, seed=0), embeds(2, 1, seed=1)
    pipeline = tiny_video_pipeline()
    first, again, other = (distances(pipeline, target, candidates, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(0, 2), (3, 1)])
def test_candidates_that_do_not_correspond(shape):
    with pytest.raises(ValueError, match=r"`candidate_embeds` must be \(candidates, 2, 12, 16\)"):
        distances(tiny_video_pipeline(), embeds(2, seed=0), embeds(*shape, seed=1))

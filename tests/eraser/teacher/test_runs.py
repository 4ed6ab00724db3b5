from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.core.seeds import stream_generator, stream_seed
from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.concept_masks import concept_head_weights
from diffusers_ext.eraser.teacher.runs import (
    AttentionRequest,
    EraserText,
    calibrate_heads,
    plan_trajectories,
    served_steps,
    teacher_trajectory,
)
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.eraser.teacher_runs import SHAPE, SIZE, TARGET, CountedVelocity, make_recipe, tiny_teacher
from tests.tiny_erasers import add_random_eraser


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def walk(teacher, scheduler, drawn, guidance=3.0, **options):
    _, velocity, texts = teacher
    latents = randn_tensor((2, *SHAPE), generator=drawn)
    return list(
        teacher_trajectory(
            velocity,
            scheduler,
            latents,
            texts.target,
            texts.empty.expand_as(texts.target),
            num_inference_steps=4,
            guidance_scale=guidance,
            generators=drawn,
            **options,
        )
    )


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_it_samples_what_the_pipeline_samples(teacher, kind, guidance):
    pipeline, _, texts = teacher
    own = pipeline.scheduler
    scheduler = kind.from_config(own.config)
    before = scheduler.timesteps.clone()
    points = walk(teacher, scheduler, generators(3, 4), guidance, extra_prompt_embeds=texts.anchor)
    torch.testing.assert_close(scheduler.timesteps, before)  # a copy has been used
    num_frames, height, width = SIZE
    try:
        pipeline.scheduler = scheduler
        wanted = pipeline(
            TARGET,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=guidance,
            generator=generators(3, 4),
            output_type="latent",
            max_sequence_length=PROMPT_LENGTH,
        ).frames
    finally:
        pipeline.scheduler = own
    torch.testing.assert_close(points[-1].x_next, wanted, rtol=1e-5, atol=1e-5)
    assert [int(point.t[0]) for point in points] == scheduler.timesteps.tolist()
    for point, after in zip(points, points[1:], strict=False):
        assert torch.equal(point.x_next, after.x_t)


def test_velocities_are_those_of_the_model_at_each_point(teacher):
    pipeline, velocity, texts = teacher
    wanted = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    points = walk(teacher, pipeline.scheduler, generators(5, 6), extra_prompt_embeds=texts.anchor, extra_at=wanted)
    for point, chosen in zip(points, wanted, strict=True):
        with torch.no_grad():
            v_target = velocity(point.x_t, point.t, texts.target)
            v_empty = velocity(point.x_t, point.t, texts.empty.expand_as(texts.target))
            v_anchor = velocity(point.x_t, point.t, texts.anchor)
        torch.testing.assert_close(point.velocity, v_target)
        torch.testing.assert_close(point.negative, v_empty)
        if chosen.any():
            torch.testing.assert_close(point.extra, v_anchor[chosen])
        else:
            assert point.extra is None
        assert not point.velocity.requires_grad
        assert point.attention is None


def test_attention_is_that_of_the_pass_of_the_prompts(teacher):
    pipeline, velocity, texts = teacher
    tokens = torch.zeros(2, PROMPT_LENGTH, dtype=torch.bool)
    tokens[0, 2] = tokens[1, 3] = True
    at = torch.tensor([[False, False], [True, False], [True, True], [False, True]])
    weights = torch.tensor([[0.0, 0.75], [0.25, 0.0]])
    request = AttentionRequest(tokens, at, weights)
    points = walk(teacher, pipeline.scheduler, generators(5, 6), attention=request)
    assert points[0].attention is None
    for point, chosen in zip(points[1:], at[1:], strict=True):
        attention = concept_attention(velocity.model, tokens, head_weights=weights)
        with attention as attended, torch.no_grad():
            velocity(point.x_t, point.t, texts.target)
        torch.testing.assert_close(point.attention[chosen], attended.maps[chosen], rtol=1e-4, atol=1e-4)
        assert attended.maps.any(dim=1).all()
        assert point.attention[~chosen].eq(0).all()


def test_the_teacher_leaves_modes_and_gradients_as_they_were(teacher):
    transformer = tiny_teacher()[1].model
    transformer.train()
    transformer.norm_final.eval()
    before = [module.training for module in transformer.modules()]

    def use_and_fail():
        with frozen_teacher(transformer):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in transformer.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use_and_fail()
    assert [module.training for module in transformer.modules()] == before
    assert torch.is_grad_enabled()


def test_nothing_stays_changed_between_two_steps(teacher):
    pipeline, velocity, texts = teacher
    velocity.model.train()
    try:
        points = teacher_trajectory(
            velocity,
            pipeline.scheduler,
            torch.randn(2, *SHAPE),
            texts.target,
            texts.empty.expand_as(texts.target),
            num_inference_steps=2,
            guidance_scale=3.0,
        )
        next(points)
        assert all(module.training for module in velocity.model.modules())
        assert torch.is_grad_enabled()
    finally:
        velocity.model.eval()


def test_steps_are_counted_on_a_copy(teacher):
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    assert served_steps(teacher[1], scheduler, 7, SHAPE) == list(range(7))
    assert scheduler.num_inference_steps is None


def test_bad_input_is_refused(teacher):
    pipeline, velocity, texts = teacher
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0}
    latents = torch.randn(3, *SHAPE)
    empty = texts.empty.expand_as(texts.target)
    with pytest.raises(ValueError, match=r"one row of embeddings of one shape each, got \(3, 3,"):
        teacher_trajectory(velocity, pipeline.scheduler, latents, texts.target, empty, **arguments)
    with pytest.raises(ValueError, match="prediction type 'v_prediction', got 'epsilon' in a DDIM"):
        teacher_trajectory(velocity, DDIMScheduler(), latents[:2], texts.target, empty, **arguments)


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


def calibrate(teacher, velocity, tokens, **changes):
    pipeline, _, texts = teacher
    recipe = make_recipe(**{"num_inference_steps": 2, **changes})
    text = EraserText(*texts[:3], texts.empty[0])
    return calibrate_heads(velocity, pipeline.scheduler, text, tokens, recipe, SHAPE, show_progress=False)


def second_prompt():
    tokens = torch.zeros(2, PROMPT_LENGTH, dtype=torch.bool)
    tokens[1, 3] = True
    return tokens


def test_weights_are_those_of_states_along_guided_runs_of_prompts_with_the_concept(teacher):
    pipeline, velocity, texts = teacher
    states = []
    for index in range(8):
        generator = stream_generator(5, "heads", index)
        points = teacher_trajectory(
            velocity,
            pipeline.scheduler,
            randn_tensor((1, *SHAPE), generator),
            texts.target[1:],
            texts.empty,
            num_inference_steps=2,
            guidance_scale=3.0,
        )
        states += [(point.x_t, point.t) for point in points]
    x_t, t = (torch.cat(parts) for parts in zip(*states))
    expected = concept_head_weights(
        velocity,
        x_t,
        t,
        texts.target[1:].expand(16, -1, -1),
        texts.anchor[1:].expand(16, -1, -1),
        second_prompt()[1:].expand(16, -1),
    )
    found = calibrate(teacher, velocity, second_prompt(), seed=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(calibrate(teacher, velocity, second_prompt(), seed=6), found)


def test_long_runs_are_not_made(teacher):
    counted = CountedVelocity(teacher[1])
    calibrate(teacher, counted, second_prompt(), num_inference_steps=50)
    assert counted.rows == [2] * 64  # 8 runs of 4 steps, then each state with and without


def test_an_eraser_is_off_and_the_mode_comes_back(teacher):
    expected = calibrate(teacher, teacher[1], second_prompt())
    _, velocity, _ = tiny_teacher()
    add_random_eraser(velocity.model)
    velocity.model.train()
    assert torch.equal(calibrate(teacher, velocity, second_prompt()), expected)
    assert all(module.training for module in velocity.model.modules())


def test_a_concept_in_no_prompt_is_refused(teacher):
    nowhere = torch.zeros(2, PROMPT_LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="`token_mask` must mark the concept in some prompt"):
        calibrate(teacher, teacher[1], nowhere)

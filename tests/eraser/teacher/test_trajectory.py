from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.teacher.runs import AttentionRequest, count_steps, teacher_trajectory
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.eraser.teacher_runs import SHAPE, SIZE, TARGET, tiny_teacher


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


def test_steps_are_counted_on_a_copy():
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    assert count_steps(scheduler, 7) == 7
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

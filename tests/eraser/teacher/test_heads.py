from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.eraser.concept_masks import concept_head_weights
from diffusers_ext.eraser.teacher.runs import calibrate_heads, teacher_trajectory
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.eraser.teacher_runs import SHAPE, CountedVelocity, tiny_teacher
from tests.tiny_erasers import add_random_eraser


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


def calibrate(teacher, velocity, tokens, **changes):
    pipeline, _, texts = teacher
    options = {"latent_shape": SHAPE, "num_inference_steps": 2, "guidance_scale": 3.0}
    given = (texts.target, texts.anchor, texts.empty[0], tokens)
    return calibrate_heads(velocity, pipeline.scheduler, *given, **options | changes, show_progress=False)


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

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import default_collate

from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.training.eraser.data import ClipSize, make_data
from diffusers_ext.training.eraser.run import add_eraser, make_step
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.eraser_runs import fill_eraser, tiny_prompts

RECIPE = EraserTraining(
    rank=4,
    num_target_trajectories=2,
    num_preserved_trajectories=2,
    num_inference_steps=3,
    localization_weight=0.1,
    adversarial_share=0.5,
    adversarial_every=2,
    adversarial_steps=3,
    num_adversarial_embeddings=5,
    num_adversarial_sets=2,
)
SIZE = ClipSize(9, 16, 16)


@pytest.fixture(scope="module")
def trained():
    pipeline = tiny_video_pipeline()
    data = make_data(pipeline, tiny_prompts(), RECIPE, SIZE, concept="seven")
    parameters = add_eraser(pipeline.transformer, RECIPE)
    fill_eraser(parameters)
    return pipeline, data, parameters


def make(trained, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return make_step(*trained[:2], recipe, torch.device("cpu"))


def batch_of(data):
    return default_collate([data.samples[number] for number in (0, 1, 2, 3)])


def test_prompts_get_learned_embeddings_from_the_first_attack_on(trained):
    _, data, parameters = trained
    step, generator = make(trained), torch.Generator().manual_seed(1)
    rows = step.maker.rows(step.maker.teacher_rows(batch_of(data), generator))
    prompts = [step.adversarial_prompts.prompts(rows, generator) for _ in range(7)]
    assert prompts[:2] == [None, None]
    for longer in prompts[2:]:
        assert longer.shape == (2, 12 + 5, 16)
        assert torch.equal(longer[:, :12], rows.prompt_embeds[:2])
    assert len({found[0, -1].sum().item() for found in prompts[2:]}) > 1
    assert len(step.adversarial_prompts._sets) == 2
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.requires_grad for parameter in parameters)


def test_the_loss_counts_the_answers_to_these_prompts(trained):
    pipeline, data, _ = trained
    step, batch = make(trained), batch_of(data)
    rows = step.maker.rows(step.maker.teacher_rows(batch, torch.Generator()))
    for _ in range(2):
        step.adversarial_prompts.prompts(rows, torch.Generator().manual_seed(3))
    lengths = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, inputs, __: lengths.append(inputs["encoder_hidden_states"].shape[:2]), with_kwargs=True
    )
    state = step.adversarial_prompts.state_dict()
    losses = step(pipeline.transformer, batch, torch.Generator().manual_seed(3))
    hook.remove()
    assert lengths[-2:] == [(2, 17), (6, 12)]
    again = make(trained)
    again.adversarial_prompts.load_state_dict(state)
    prompts = again.adversarial_prompts.prompts(rows, torch.Generator().manual_seed(3))
    with torch.no_grad():
        attacked = step.maker.velocity(rows.x_t[:2], rows.t[:2], prompts)
        rest = step.maker.velocity(rows.x_t[2:4], rows.t[2:4], rows.prompt_embeds[2:4])
    expected = (torch.cat([attacked, rest]) - rows.target_velocity[:4]).square().mean()
    torch.testing.assert_close(losses["unlearning"].detach(), expected)


def test_no_share_makes_no_attack(trained):
    assert make(trained, adversarial_share=0.0).stateful == []

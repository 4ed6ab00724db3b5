from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import default_collate

from diffusers_ext.core.seeds import spread_rows
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.training.eraser.run import make_step
from tests.training.eraser_runs import tiny_training

RECIPE = EraserTraining(
    rank=4,
    num_target_trajectories=2,
    num_preserved_trajectories=2,
    num_inference_steps=3,
    sampling_batch_size=2,
    localization_weight=0.1,
    on_policy_share=0.5,
    on_policy_every=2,
)


@pytest.fixture(scope="module")
def trained():
    return tiny_training(RECIPE)[:2]


def make(trained, **changes):
    return make_step(*trained, dataclasses.replace(RECIPE, **changes), torch.device("cpu"))


def test_states_are_those_of_the_student(trained):
    pipeline, _ = trained
    runs = [make(trained).rollouts for _ in range(2)]
    scheduler = pipeline.scheduler
    seed = torch.Generator().manual_seed
    own = runs[0].take(400, seed(5))
    with erasers_disabled(pipeline.transformer):
        teachers = runs[1].take(400, seed(5))
    assert pipeline.scheduler is scheduler
    assert torch.equal(own.t, teachers.t)
    assert torch.equal(own.prompts, teachers.prompts)
    times = sorted({*own.t.tolist()}, reverse=True)
    assert len(times) == 3
    first, later = own.t == times[0], own.t == times[2]
    assert torch.equal(own.x_t[first], teachers.x_t[first])
    assert not torch.allclose(own.x_t[later], teachers.x_t[later], atol=1e-4)


def test_states_step_by_step_are_those_of_the_pipeline_s_call(trained, monkeypatch):
    pipeline, _ = trained
    pipeline.transformer.train()
    expected = make(trained, localization_weight=0.0).rollouts.take(40, torch.Generator().manual_seed(5))
    monkeypatch.setattr(CogVideoX, "reports_steps", False)
    monkeypatch.setattr(type(pipeline), "__call__", None)
    found = make(trained, localization_weight=0.0).rollouts.take(40, torch.Generator().manual_seed(5))
    assert pipeline.transformer.training
    assert torch.equal(found.t, expected.t)
    assert torch.equal(found.prompts, expected.prompts)
    torch.testing.assert_close(found.x_t, expected.x_t, atol=1e-4, rtol=1e-4)
    assert not found.x_t.requires_grad
    with erasers_disabled(pipeline.transformer):
        other = make(trained, localization_weight=0.0).rollouts.take(40, torch.Generator().manual_seed(5))
    assert not torch.allclose(other.x_t, expected.x_t, atol=1e-4)


def test_the_teacher_answers_at_the_students_states(trained):
    pipeline, data = trained
    step = make(trained)
    batch = default_collate([data.samples[number] for number in (0, 1, 2, 3)])
    known = step.maker.teacher_rows(batch, torch.Generator())
    states = step.rollouts.take(2, torch.Generator().manual_seed(1))
    replaced = step.maker.replace_target(known, states)
    kept = sorted({0, 1, 2, 3} - set(spread_rows(2, 4)))
    assert torch.equal(replaced.target.x_t, torch.cat([states.x_t, known.target.x_t[kept]]))
    assert torch.equal(replaced.mask[2:], known.mask[kept])
    v_concept, v_anchor, _, mask = step.maker.ask_teacher(replaced.target, known.preserved)
    torch.testing.assert_close(replaced.v_concept, v_concept)
    torch.testing.assert_close(replaced.v_anchor, v_anchor)
    torch.testing.assert_close(replaced.mask, mask, rtol=0, atol=5e-3)
    assert torch.equal(replaced.v_preserved, known.v_preserved)


def test_it_runs_anew_only_now_and_then_and_goes_on_from_its_state(trained):
    generators = [torch.Generator().manual_seed(number) for number in range(4)]
    whole = make(trained).rollouts
    before = [generator.get_state() for generator in generators]
    expected = [whole.take(3, generator) for generator in generators]
    pool = {*whole._states.x_t.sum((1, 2, 3, 4)).tolist()}
    assert {*expected[3].x_t.sum((1, 2, 3, 4)).tolist()} <= pool
    assert not {*expected[1].x_t.sum((1, 2, 3, 4)).tolist()} <= pool
    for generator, state in zip(generators, before):
        generator.set_state(state)
    first, second = make(trained).rollouts, make(trained).rollouts
    found = [first.take(3, generators[0])]
    second.load_state_dict(first.state_dict())
    found += [second.take(3, generator) for generator in generators[1:]]
    for found_states, expected_states in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(found_states, expected_states))

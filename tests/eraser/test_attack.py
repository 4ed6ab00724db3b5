from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.attack import insert_embeddings, learn_revival_embeddings, revived_call, revived_prompts
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.evaluation.rendering import render_clips
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.training.eraser.run import make_step
from tests.eraser.erased_models import erased_pipeline, random_rows
from tests.evaluation.erased_model_states import unchanged
from tests.training.eraser_runs import tiny_training

CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 1}


def attacked(kind="rotary", points=6):
    pipeline = erased_pipeline(kind, torch.float32)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "eraser_" in name:
                parameter.mul_(4)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    frames = 4 if kind == "1.5" else 3
    return pipeline, velocity, random_rows(points, frames, dtype=torch.float32)


@torch.no_grad()
def distance(velocity, rows, embeddings):
    x_t, t, embeds = rows
    with erasers_disabled(velocity.model):
        before = velocity(x_t, t, embeds)
    found = velocity(x_t, t, insert_embeddings(embeds, embeddings, velocity.config))
    return (found - before).square().mean().item()


@pytest.mark.parametrize("kind", ["rotary", "absolute", "1.5"])
def test_learned_embeddings_bring_the_erased_model_nearer_to_the_one_before(kind):
    _, velocity, rows = attacked(kind)
    with unchanged(velocity.model):
        start = learn_revival_embeddings(velocity, *rows, num_embeddings=4, steps=1, learning_rate=0.0)
        found = learn_revival_embeddings(velocity, *rows, num_embeddings=4, steps=25)
    assert found.embeddings.shape == (4, 16)
    assert len(found.losses) == 25
    assert found.losses[0] == start.losses[0]
    assert distance(velocity, rows, found.embeddings) < 0.9 * distance(velocity, rows, start.embeddings)


def test_the_first_loss_is_the_distance_to_the_model_before():
    _, velocity, rows = attacked(points=3)
    start = learn_revival_embeddings(velocity, *rows, steps=1, learning_rate=0.0)
    assert start.losses[0] == pytest.approx(distance(velocity, rows, start.embeddings), rel=1e-5)


def test_the_seed_alone_decides():
    _, velocity, rows = attacked()
    torch.manual_seed(5)
    first = learn_revival_embeddings(velocity, *rows, steps=3)
    torch.manual_seed(6)
    again = learn_revival_embeddings(velocity, *rows, steps=3)
    other = learn_revival_embeddings(velocity, *rows, steps=3, seed=1)
    assert torch.equal(first.embeddings, again.embeddings)
    assert first.losses == again.losses
    assert not torch.equal(first.embeddings, other.embeddings)


def test_the_best_of_several_searches_is_given():
    _, velocity, rows = attacked(points=3)
    given = {"num_embeddings": 4, "steps": 5}
    each = [learn_revival_embeddings(velocity, *rows, seed=seed, **given) for seed in (2, 3, 4)]
    best = learn_revival_embeddings(velocity, *rows, seed=2, restarts=3, **given)
    assert best.losses == min((one.losses for one in each), key=lambda losses: losses[-1])


def test_known_velocities_spare_the_passes_of_the_model_before():
    _, velocity, rows = attacked()
    with torch.no_grad(), erasers_disabled(velocity.model):
        v_concept = velocity(*rows)
    asked = learn_revival_embeddings(velocity, *rows, steps=3)
    calls = []
    hook = velocity.model.register_forward_pre_hook(lambda *_: calls.append(1))
    known = learn_revival_embeddings(velocity, *rows, v_concept=v_concept, steps=3)
    hook.remove()
    assert len(calls) == 3
    torch.testing.assert_close(known.embeddings, asked.embeddings)


def test_the_model_comes_back_after_an_exception():
    _, velocity, (x_t, t, embeds) = attacked()
    velocity.model.train()
    with unchanged(velocity.model), pytest.raises(ValueError, match="`prompt_embeds` must be"):
        learn_revival_embeddings(velocity, x_t, t, embeds[..., :8], steps=3)


def test_embeddings_follow_the_prompt_or_take_the_place_of_its_end():
    embeds, added = random_rows(2)[2], torch.ones(3, 16)
    rotary, absolute = (attacked(kind)[1].config for kind in ("rotary", "absolute"))
    longer = insert_embeddings(embeds, added, rotary)
    assert longer.shape == (2, 15, 16)
    assert torch.equal(longer[:, :12], embeds)
    assert (longer[:, 12:] == 1).all()
    same = insert_embeddings(embeds, added, absolute)
    assert torch.equal(same[:, :9], embeds[:, :9])
    assert (same[:, 9:] == 1).all()
    padded = torch.cat([torch.ones(2, 3, 16), torch.zeros(2, 2, 16)], dim=1)
    padded[1, 1:] = 0
    wan = insert_embeddings(padded, 2 * torch.ones(4, 16), {})  # cross-attention
    assert wan[..., 0].tolist() == [[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 0, 0]]
    with pytest.raises(ValueError, match="fewer than the 12 text tokens .* got 12"):
        insert_embeddings(embeds, torch.ones(12, 16), absolute)
    with pytest.raises(ValueError, match="`embeddings` must be \\(num_embeddings, 16\\), got"):
        insert_embeddings(embeds, torch.ones(3, 8), rotary)


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_pipeline_draws_with_the_embeddings_and_then_as_before(kind, guidance_scale):
    pipeline = attacked(kind)[0]

    def draw(number=1):
        return render_clips(
            pipeline, ["a red seven moving right"] * number, seeds=list(range(number)),
            batch_size=2, guidance_scale=guidance_scale, **CALL,
        )  # fmt: skip

    before = draw()
    embeddings = 5 * random_rows(1, seed=4, dtype=torch.float32)[2][0, :4]
    prompts = ["a red seven moving right"] * 2
    given = revived_call(pipeline, prompts, embeddings)
    called = render_clips(
        pipeline, prompts, seeds=[0, 1], batch_size=2, guidance_scale=guidance_scale, **CALL, **given
    )
    with revived_prompts(pipeline, embeddings):
        inside = draw(2)
        assert np.array_equal(called, inside)
        with revived_prompts(pipeline, -embeddings):
            assert not np.array_equal(draw(), inside[:1])
        assert np.array_equal(draw(2), inside)
    assert not np.array_equal(inside[:1], before)
    assert "encode_prompt" not in vars(pipeline)
    assert np.array_equal(draw(), before)


@pytest.mark.parametrize("masked", [True, False])
def test_text_with_more_than_tokens_gets_them_after_its_last_token(masked):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    text = TextConditioning(
        torch.ones(2, 4, 8), attention_mask=mask if masked else None, pooled_prompt_embeds=torch.ones(2, 5)
    )
    found = insert_embeddings(text, torch.full((2, 8), 2.0), {})
    read = mask if masked else torch.ones_like(mask)
    assert found.prompt_embeds.shape == (2, 6, 8)
    for row, length in enumerate(read.sum(1).tolist()):
        assert found.prompt_embeds[row, length : length + 2].eq(2).all()
        assert found.prompt_embeds[row, :length].eq(1).all()
        if masked:
            assert found.attention_mask[row].tolist() == [1] * (length + 2) + [0] * (4 - length)
    assert found.pooled_prompt_embeds is text.pooled_prompt_embeds


def test_prompts_are_encoded_as_before_after_an_exception():
    pipeline = attacked()[0]
    with pytest.raises(KeyError, match="stop"), revived_prompts(pipeline, torch.ones(4, 16)):
        raise KeyError("stop")
    assert "encode_prompt" not in vars(pipeline)


def test_bad_input_is_refused():
    pipeline, velocity, (x_t, t, embeds) = attacked()
    with pytest.raises(ValueError, match="`t` must have one row per point of `x_t`, 6, got 5"):
        learn_revival_embeddings(velocity, x_t, t[:5], embeds)
    with pytest.raises(ValueError, match="`x_t` must hold at least one point"):
        learn_revival_embeddings(velocity, x_t[:0], t[:0], embeds[:0])
    for name in ("num_embeddings", "steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            learn_revival_embeddings(velocity, x_t, t, embeds, **{name: 0})
    pipeline.transformer.delete_adapters("eraser")
    with pytest.raises(ValueError, match="`velocity` must be of a model with an eraser"):
        learn_revival_embeddings(velocity, x_t, t, embeds)


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


@pytest.fixture(scope="module")
def trained():
    return tiny_training(RECIPE)


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
    rows = step.adversarial_prompts.first(rows, 0)
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


def test_rows_with_these_prompts_are_spread_so_that_processes_have_their_parts(trained):
    step = make(trained)
    rows = step.maker.rows(step.maker.teacher_rows(batch_of(trained[1]), torch.Generator()))
    numbered = rows._replace(t=torch.arange(8), weights=torch.arange(8.0))
    first = step.adversarial_prompts.first
    for on_policy, expected in ((0, [1, 3, 0, 2]), (1, [0, 3, 1, 2]), (2, [0, 1, 2, 3]), (4, [1, 3, 0, 2])):
        found = first(numbered, on_policy)
        assert found.t.tolist() == found.weights.tolist() == [*expected, 4, 5, 6, 7]
        assert torch.equal(found.teacher_velocity, rows.teacher_velocity[expected])
        assert torch.equal(found.prompt_embeds[:4], rows.prompt_embeds[expected])
        assert torch.equal(found.mask, rows.mask[expected])


def test_no_share_makes_no_attack(trained):
    assert make(trained, adversarial_share=0.0).stateful == []

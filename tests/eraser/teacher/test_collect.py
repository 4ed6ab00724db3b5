from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.concept_masks import concept_mask
from diffusers_ext.eraser.losses import T2VUnlearningLoss
from diffusers_ext.eraser.teacher.collect import cached_or_predicted, teacher_velocities, velocities
from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.eraser.erased_models import KINDS, random_rows
from tests.eraser.loss_setting import Setting, count_calls
from tests.eraser.teacher_runs import GUIDANCE, SHAPE, STEPS, CountedVelocity, collect, tiny_teacher
from tests.tiny_erasers import add_random_eraser


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def samples(teacher):
    pipeline, velocity, texts = teacher
    return collect(velocity, pipeline, texts, empty_share=0.5)


@pytest.fixture(scope="module")
def masked(teacher):
    """Target runs with soft masks, of a concept that only the first prompt names."""
    pipeline, velocity, texts = teacher
    return collect(velocity, pipeline, texts, token_mask=first_prompt(), num_preserved=0)


def first_prompt():
    tokens = torch.zeros(2, PROMPT_LENGTH, dtype=torch.bool)
    tokens[0, 2] = True
    return tokens


def rows(samples, part):
    kept = samples.parts[part]
    return [kept[index] for index in range(len(kept))]


def assert_same(first, second, **tolerance):
    for part in ("target", "preserved"):
        for a, b in zip(rows(first, part), rows(second, part), strict=True):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], **tolerance)


def test_rows_are_points_of_runs_with_the_velocities_of_the_model(teacher, samples):
    _, velocity, texts = teacher
    assert len(rows(samples, "target")) == 3 * STEPS
    assert len(rows(samples, "preserved")) == len(samples) == 4 * STEPS

    def ask(row, text):
        with torch.no_grad():
            return velocity(row["x_t"][None], row["t"][None], text[None])[0]

    for row in rows(samples, "target"):
        concept, anchor = texts.target[row["prompt"]], texts.anchor[row["prompt"]]
        torch.testing.assert_close(row["v_concept"], ask(row, concept))
        torch.testing.assert_close(row["v_anchor"], ask(row, anchor))
        assert "mask" not in row
    empty = 0
    for row in rows(samples, "preserved"):
        text = texts.empty[0] if row["prompt"] < 0 else texts.preserved[row["prompt"]]
        torch.testing.assert_close(row["velocity"], ask(row, text))
        empty += int(row["prompt"] < 0)
    assert empty == 8


def test_a_run_is_the_one_of_its_own_generator(teacher, samples):
    pipeline, velocity, texts = teacher
    generator = stream_generator(0, "target", 2)
    prompt = int(rows(samples, "target")[2 * STEPS]["prompt"])
    points = teacher_trajectory(
        velocity,
        pipeline.scheduler,
        randn_tensor((1, *SHAPE), generator=[generator]),
        texts.target[[prompt]],
        texts.empty,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    for row, point in zip(rows(samples, "target")[2 * STEPS :], points, strict=True):
        torch.testing.assert_close(row["x_t"], point.x_t[0], rtol=1e-4, atol=1e-5)
        assert row["t"] == point.t[0]


def test_samples_do_not_depend_on_the_batch(teacher, samples):
    pipeline, velocity, texts = teacher
    for size in (1, 4):
        other = collect(velocity, pipeline, texts, empty_share=0.5, batch_size=size)
        assert_same(samples, other, rtol=1e-4, atol=1e-5)


def test_other_seeds_give_other_samples(teacher, samples):
    pipeline, velocity, texts = teacher
    other = collect(velocity, pipeline, texts, seed=1, num_target=1, num_preserved=0)
    assert not torch.allclose(rows(other, "target")[0]["x_t"], rows(samples, "target")[0]["x_t"])


def test_points_of_a_run_are_those_of_the_whole_run(teacher, samples):
    pipeline, velocity, texts = teacher
    some = collect(velocity, pipeline, texts, points_per_trajectory=2)
    whole = {(int(row["prompt"]), int(row["t"])): row for row in rows(samples, "target")[:8]}
    found = rows(some, "target")[:4]
    for row in found:
        match = whole[int(row["prompt"]), int(row["t"])]
        torch.testing.assert_close(row["x_t"], match["x_t"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row["v_anchor"], match["v_anchor"], rtol=1e-4, atol=1e-5)
    assert len(rows(some, "target")) == 6


def test_more_points_than_steps_are_all_points(teacher, samples, caplog):
    pipeline, velocity, texts = teacher
    caplog.set_level("INFO")
    every = collect(velocity, pipeline, texts, points_per_trajectory=16, empty_share=0.5)
    assert "All 4 points of every run are kept: `points_per_trajectory` is 16." in caplog.text
    for part in ("target", "preserved"):
        for row, expected in zip(rows(every, part), rows(samples, part), strict=True):
            assert row.keys() == expected.keys()
            assert all(torch.equal(row[name], expected[name]) for name in row)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, [6] * 4 + [4] * 4),  # concept, empty, anchor; then preserved, empty
        ({"guidance_scale": 1.0, "empty_share": 0.0}, [4] * 4 + [2] * 4),
        ({"guidance_scale": 1.0, "empty_share": 1.0}, [4] * 4 + [4] * 4),
        ({"anchor_embeds": "empty"}, [4] * 4 + [4] * 4),
    ],
)
def test_each_step_is_one_pass_over_no_more_rows_than_needed(teacher, changes, asked):
    pipeline, velocity, texts = teacher
    if "anchor_embeds" in changes:
        texts = texts._replace(anchor=texts.empty.expand_as(texts.target))
        changes = {}
    counted = CountedVelocity(velocity)
    found = collect(counted, pipeline, texts, num_target=2, num_preserved=2, **changes)
    assert counted.rows == asked
    row = rows(found, "target")[1]
    with torch.no_grad():
        anchor = velocity(row["x_t"][None], row["t"][None], texts.anchor[int(row["prompt"])][None])
    torch.testing.assert_close(row["v_anchor"], anchor[0])


def test_a_run_stops_after_its_last_point(teacher):
    pipeline, velocity, texts = teacher
    lengths = set()
    for seed in range(6):
        counted = CountedVelocity(velocity)
        settings = {"num_target": 1, "num_preserved": 0, "points_per_trajectory": 1}
        found = collect(counted, pipeline, texts, seed=seed, **settings)
        step = pipeline.scheduler.timesteps.new_tensor([999, 749, 499, 249]).tolist()
        last = step.index(int(rows(found, "target")[0]["t"]))
        assert counted.rows == [2] * last + [3]
        lengths.add(last)
    assert len(lengths) > 1


@pytest.mark.parametrize("setting", ["guided", "plain", "empty anchor"])
def test_masks_are_those_of_heads_and_velocities(setting, teacher, masked):
    pipeline, velocity, texts = teacher
    tokens, found = first_prompt(), masked
    options = {"token_mask": tokens, "num_preserved": 0}
    if setting == "empty anchor":
        texts = texts._replace(anchor=texts.empty.expand_as(texts.target))
        found = collect(velocity, pipeline, texts, **options)
    elif setting == "plain":  # the empty prompt is not run
        found = collect(velocity, pipeline, texts, **options, guidance_scale=1.0)
    for row in rows(found, "target"):
        prompt = [int(row["prompt"])]
        wanted = concept_mask(
            velocity,
            row["x_t"][None],
            row["t"][None],
            texts.target[prompt],
            tokens[prompt],
            anchor_embeds=texts.anchor[prompt],
            empty_embeds=texts.empty if setting == "guided" else None,
            head_weights=found.head_weights,
        )
        # Roots of differences of nearly equal velocities.
        torch.testing.assert_close(row["mask"], wanted[0], rtol=0, atol=5e-3)
        assert bool(row["mask"].any()) == (prompt == [0])


def test_hard_masks(teacher, masked):
    pipeline, velocity, texts = teacher
    hard = collect(velocity, pipeline, texts, token_mask=first_prompt(), mask_threshold=0.5, num_preserved=0)
    for row, soft in zip(rows(hard, "target"), rows(masked, "target"), strict=True):
        assert torch.equal(row["mask"], (soft["mask"] >= 0.5).float())
    assert "preserved" not in masked[0]


def test_the_heads_of_masks_do_not_depend_on_what_they_are_used_for(teacher, samples):
    pipeline, velocity, texts = teacher
    assert samples.head_weights is None
    tokens = torch.ones(2, PROMPT_LENGTH, dtype=torch.bool)
    options = {"token_mask": tokens, "num_preserved": 0, "points_per_trajectory": 1}
    first, second, other = (
        collect(velocity, pipeline, texts, **options, **changes).head_weights
        for changes in ({}, {"batch_size": 1, "num_target": 1}, {"seed": 1})
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_eraser_is_off_in_the_teacher_and_on_again_afterwards(teacher, samples):
    pipeline, velocity, texts = tiny_teacher()
    transformer = velocity.model
    add_random_eraser(transformer, "seven")
    transformer.train()
    state = rows(samples, "target")[0]
    inputs = state["x_t"][None], state["t"][None], texts.target[:1]
    before = velocity(*inputs)
    erased = collect(velocity, pipeline, texts, empty_share=0.5)
    assert_same(samples, erased, rtol=0, atol=0)
    assert torch.equal(velocity(*inputs), before)
    assert before.requires_grad
    assert all(module.training for module in transformer.modules())
    with torch.no_grad(), erasers_disabled(transformer):
        assert not torch.allclose(velocity(*inputs), before, atol=1e-3)


def test_bad_input_is_refused(teacher):
    pipeline, velocity, texts = teacher
    with pytest.raises(ValueError, match="`directory` must be given where processes share"):
        collect(velocity, pipeline, texts, process=(0, 2))
    with pytest.raises(ValueError, match="must hold a prompt for 4 runs, got none"):
        collect(velocity, pipeline, texts._replace(preserved=torch.zeros(0, 12, 16)))
    with pytest.raises(ValueError, match="`latents` must be .*, with one row of embeddings of one shape each"):
        collect(velocity, pipeline, texts._replace(anchor=torch.zeros(2, 12, 8)))


def test_velocities_that_are_not_finite_are_refused():
    pipeline, velocity, texts = tiny_teacher()
    with torch.no_grad():
        velocity.model.proj_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity for prompt"):
        collect(velocity, pipeline, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_model_before_the_eraser(kind):
    s = Setting(kind)
    rows = [(s.x_t, s.t, embeds) for embeds in (s.target, s.preserve)]
    found = teacher_velocities(s.velocity, s.velocity, rows)
    s.transformer.delete_adapters("eraser")
    with torch.no_grad():
        expected = [s.velocity(*row) for row in rows]
    torch.testing.assert_close(found, expected)
    assert not any(velocity.requires_grad for velocity in found)


def test_the_teacher_answers_without_dropout_and_modes_come_back():
    s = Setting()
    s.transformer.embedding_dropout.p = 0.5
    s.transformer.train()
    (found,) = teacher_velocities(s.velocity, s.velocity, [(s.x_t, s.t, s.target)])
    torch.testing.assert_close(found, s.v_concept)
    assert all(module.training for module in s.transformer.modules())


def test_erasers_are_on_again_after_an_exception():
    s = Setting()
    with pytest.raises(ValueError, match="`t` must be"):
        teacher_velocities(s.velocity, s.velocity, [(s.x_t, s.t[:1], s.target)])
    with torch.no_grad():
        assert torch.equal(s.student(s.target), s.student_target)


def test_groups_of_rows_are_answered_in_one_pass():
    s = Setting()
    other = random_rows(3, seed=7)
    calls = count_calls(s.velocity)
    with torch.no_grad():
        first, second = velocities(s.velocity, [(s.x_t, s.t, s.target[:1]), other])
        assert calls == [(5, False)]
        torch.testing.assert_close(first, s.student(s.target[:1].repeat(2, 1, 1)))
        torch.testing.assert_close(second, s.velocity(*other))


def test_only_unknown_velocities_are_asked_for():
    s = Setting()
    calls = count_calls(s.velocity)
    known = torch.ones_like(s.x_t, requires_grad=True)
    wanted = [(known, (s.x_t, s.t, s.target)), (None, (s.x_t, s.t, s.anchor))]
    first, second = cached_or_predicted(s.velocity, s.velocity, wanted)
    assert calls == [(2, False)]
    assert torch.equal(first, known.detach())
    assert not first.requires_grad
    torch.testing.assert_close(second, s.v_anchor)


def test_a_student_without_eraser_cannot_be_its_own_teacher():
    s = Setting()
    s.transformer.delete_adapters("eraser")
    with pytest.raises(ValueError, match="`model_unlearned` must carry an eraser"):
        T2VUnlearningLoss()(*s.inputs, s.preserve, s.anchor)

"""Tests of the frozen teacher and of calls of several rows in one pass."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.losses import T2VUnlearningLoss
from diffusers_ext.eraser.teacher.collect import cached_or_predicted, teacher_velocities, velocities
from tests.eraser.erased_models import KINDS, random_rows
from tests.eraser.loss_setting import Setting, count_calls


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

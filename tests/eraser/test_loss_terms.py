"""Tests of the single terms of an eraser's loss, each against its plain formula."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.losses import ConceptPreservationLoss, NegativelyGuidedVelocityLoss, T2VUnlearningLoss
from tests.eraser.loss_setting import ETA, Setting, assert_only_the_eraser_has_gradient


def test_the_empty_prompt_is_the_anchor_without_another():
    s = Setting()
    loss_fn = NegativelyGuidedVelocityLoss(guidance_scale=ETA)
    with_uncond, _ = loss_fn(*s.inputs, uncond=s.anchor[:1])
    repeated, _ = loss_fn(*s.inputs, cond_neg=s.anchor[:1].repeat(2, 1, 1), uncond=s.preserve)
    torch.testing.assert_close(with_uncond, repeated)
    with pytest.raises(ValueError, match="`cond_neg` or `uncond` must be given .* got neither"):
        loss_fn(*s.inputs)


@pytest.mark.parametrize("kind", ["rotary", "1.5"])
def test_single_terms_are_those_of_the_whole(kind):
    s = Setting(kind)
    unlearning, parts = NegativelyGuidedVelocityLoss(None, ETA, "l1")(*s.inputs, s.anchor)
    expected = (s.student_target - ((1 + ETA) * s.v_anchor - ETA * s.v_concept)).abs().mean()
    torch.testing.assert_close(unlearning, expected)
    assert parts["unlearning_loss"] == unlearning.detach()
    preservation, _ = ConceptPreservationLoss("l1")(*s.inputs[:4], s.preserve)
    torch.testing.assert_close(preservation, (s.student_preserve - s.v_preserve).abs().mean())
    (unlearning + preservation).backward()
    assert_only_the_eraser_has_gradient(s.transformer)


@pytest.mark.parametrize("kind", ["rotary", "1.5"])
def test_a_mask_may_weigh_the_unlearning_term(kind):
    s = Setting(kind)
    mask = torch.zeros_like(s.mask)
    mask[:, 0, 0, 0] = 1
    patch, patch_t = (2, 2) if kind == "1.5" else (1, 1)
    region = (slice(None), slice(patch_t), slice(None), slice(patch), slice(patch))
    v_neg = (1 + ETA) * s.v_anchor - ETA * s.v_concept
    expected = (s.student_target - v_neg)[region].square().mean()
    found, _ = NegativelyGuidedVelocityLoss(None, ETA)(*s.inputs, s.anchor, mask=mask)
    torch.testing.assert_close(found, expected)
    loss_fn = T2VUnlearningLoss(guidance_scale=ETA, localization_weight=0.0, mask_unlearning=True)
    torch.testing.assert_close(loss_fn(*s.inputs, cond_neg=s.anchor, mask=mask)[0], expected)
    with pytest.raises(ValueError, match="`mask` must be given .* `mask_unlearning`, got None"):
        loss_fn(*s.inputs, cond_neg=s.anchor)


def test_timesteps_outside_of_the_schedule_are_refused():
    s = Setting()
    loss_fn = NegativelyGuidedVelocityLoss(torch.linspace(1, 0, 500))
    with pytest.raises(ValueError, match="`t` must lie in 0 ... 499 like `alphas_cumprod`"):
        loss_fn(*s.inputs[:3], torch.tensor([3, 700]), s.target, s.anchor)
    loss_fn(*s.inputs[:3], torch.tensor([0, 499]), s.target, s.anchor)

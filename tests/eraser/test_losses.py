"""Tests of an eraser's loss: functions and terms against plain formulas, roles of teacher and student, gradients."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.outputs import eraser_outputs, erasers_disabled
from diffusers_ext.eraser.losses import (
    ConceptPreservationLoss,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    T2VUnlearningLoss,
    layer_localization,
    negative_velocity,
    velocity_distance,
)
from tests.eraser.erased_models import KINDS, random_rows
from tests.eraser.loss_setting import ETA, Setting, assert_only_the_eraser_has_gradient, count_calls
from tests.tiny_cogvideox import tiny_transformer


def mean_localization(outputs, mask):
    return MaskLocalizationLoss()(outputs, mask)[0]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 1.0, 7.5])
def test_the_negative_velocity_leads_from_the_concept_past_the_anchor(eta):
    anchor, concept = random(2, 3, 4, 2, 2), random(2, 3, 4, 2, 2, seed=1)
    found = negative_velocity(anchor, concept, eta)
    for index in ((0, 0, 0, 0, 0), (1, 2, 3, 1, 1)):
        expected = (1 + eta) * anchor[index].item() - eta * concept[index].item()
        assert found[index].item() == pytest.approx(expected, rel=1e-12)
    assert (found - concept).norm() >= (anchor - concept).norm() - 1e-12


def test_the_rule_is_the_same_for_noise_and_clean_latents():
    alpha = 0.3
    x_t, anchor, concept = (random(1, 2, 3, 2, 2, seed=seed) for seed in range(3))

    def noise(v):
        return alpha**0.5 * v + (1 - alpha) ** 0.5 * x_t

    of_noise = negative_velocity(noise(anchor), noise(concept), 3.0)
    torch.testing.assert_close(of_noise, noise(negative_velocity(anchor, concept, 3.0)))


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_the_distance_is_the_mean_over_all_elements(loss_type):
    prediction, target = random(2, 3, 4, 2, 2), random(2, 3, 4, 2, 2, seed=1)
    differences = (prediction - target).flatten().tolist()
    power = 2 if loss_type == "l2" else 1
    expected = sum(abs(d) ** power for d in differences) / len(differences)
    assert velocity_distance(prediction, target, loss_type).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_a_masked_distance_is_the_mean_over_the_region(loss_type):
    prediction, target = random(2, 3, 4, 2, 2), random(2, 3, 4, 2, 2, seed=1)
    mask = torch.rand(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    power, total, weight = 2 if loss_type == "l2" else 1, 0.0, 0.0
    for b, f, c, y, x in torch.cartesian_prod(*map(torch.arange, prediction.shape)).tolist():
        m = mask[b, f, 0, y, x].item()
        total += m * abs((prediction - target)[b, f, c, y, x].item()) ** power
        weight += m
    found = velocity_distance(prediction, target, loss_type, mask)
    assert found.item() == pytest.approx(total / weight)
    torch.testing.assert_close(velocity_distance(prediction, target, loss_type, 0.1 * mask), found)
    assert velocity_distance(prediction, target, loss_type, 0 * mask).item() == 0


def test_half_precision_is_compared_in_float32():
    prediction = torch.full((1000,), 300.0, dtype=torch.float16)
    found = velocity_distance(prediction, torch.zeros_like(prediction))
    assert found.dtype == torch.float32
    assert found.item() == 90_000


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_localization_is_divided_by_channels_and_background(loss_type):
    output = random(2, 6, 5)
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)).double()
    mask[0, :3] = 1
    samples = []
    for b in range(2):
        area = sum(1 - mask[b, v].item() for v in range(6))
        terms = [abs(output[b, v, c].item() * (1 - mask[b, v].item()))
                 for v in range(6) for c in range(5)]  # fmt: skip
        samples.append(sum(x**2 if loss_type == "l2" else x for x in terms) / (5 * area))
    found = layer_localization(output, mask, loss_type)
    assert found.item() == pytest.approx(sum(samples) / 2)
    for shape in ((2, 6, 1), (2, 3, 2, 1)):
        torch.testing.assert_close(layer_localization(output, mask.view(shape), loss_type), found)


def test_localization_does_not_grow_with_clip_width_or_layers():
    small = mean_localization({"a": torch.ones(1, 4, 2)}, torch.zeros(1, 4))
    large = mean_localization({name: torch.ones(3, 64, 32) for name in "abc"}, torch.zeros(3, 64))
    assert small.item() == large.item() == 1


def test_localization_sees_only_the_background():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    output = torch.randn(1, 4, 3, requires_grad=True)
    mean_localization({"a": output, "b": output}, mask).backward()
    assert (output.grad[:, :2] == 0).all()
    assert (output.grad[:, 2:] != 0).all()
    assert mean_localization({"a": output}, torch.ones(1, 4)).item() == 0


def test_layers_are_averaged():
    mask = torch.zeros(1, 4)
    layers = {"a": random(1, 4, 3), "b": random(1, 4, 3, seed=1)}
    expected = sum(layer_localization(o, mask).item() for o in layers.values()) / 2
    assert mean_localization(layers, mask).item() == pytest.approx(expected)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`v_concept` must have the shape of `v_anchor`, \\(2, 3"):
        negative_velocity(torch.zeros(2, 3), torch.zeros(1, 3), 1.0)
    with pytest.raises(ValueError, match="`prediction` must have the shape of `target`, \\(3,\\)"):
        velocity_distance(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="`mask` must broadcast to \\(2, 3\\), got \\(2, 2\\)"):
        velocity_distance(torch.zeros(2, 3), torch.zeros(2, 3), "l2", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`loss_type` must be 'l2' or 'l1', got 'huber'"):
        velocity_distance(torch.zeros(2), torch.zeros(2), "huber")
    with pytest.raises(ValueError, match="4 video tokens of 1 samples, got \\(1, 5\\)"):
        layer_localization(torch.zeros(1, 4, 2), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="`outputs` must hold .* at least one eraser, got none"):
        mean_localization({}, torch.zeros(1, 4))


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_loss_is_its_formula(kind):
    s = Setting(kind)
    with torch.no_grad(), eraser_outputs(s.transformer) as outputs:
        s.student(s.target)
    v_neg = s.v_anchor - ETA * (s.v_concept - s.v_anchor)
    unlearning = (s.student_target - v_neg).square().mean().item()
    preservation = (s.student_preserve - s.v_preserve).square().mean().item()
    background = 1 - s.mask.reshape(2, -1)
    layers = [
        (((o * background[..., None]) ** 2).mean(2).sum(1) / background.sum(1)).mean().item() for o in outputs.values()
    ]
    loss_fn = T2VUnlearningLoss(None, 1.0, 0.5, 3.0, ETA)
    loss, parts = loss_fn(*s.inputs, s.preserve, s.anchor, mask=s.mask)
    expected = unlearning + 0.5 * preservation + 3 * sum(layers) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    logged = {
        "total_loss": expected,
        "unlearning_loss_weighted": unlearning,
        "preservation_loss_weighted": 0.5 * preservation,
        "localization_loss_weighted": 3 * sum(layers) / 2,
        "unlearning/unlearning_loss": unlearning,
        "unlearning/v_pred_norm": s.student_target.flatten(1).norm(dim=1).mean().item(),
        "unlearning/v_neg_norm": v_neg.flatten(1).norm(dim=1).mean().item(),
        "preservation/preservation_loss": preservation,
        "preservation/v_orig_norm": s.v_preserve.flatten(1).norm(dim=1).mean().item(),
        "preservation/v_unlearn_norm": s.student_preserve.flatten(1).norm(dim=1).mean().item(),
        "localization/total_loss": sum(layers) / 2,
        "localization/num_layers": 2,
        "localization/transformer_blocks.0.attn1/loss": layers[0],
        "localization/transformer_blocks.1.attn1/loss": layers[1],
    }
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(logged)
    assert not any(getattr(value, "requires_grad", False) for value in parts.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_but_the_eraser_gets_a_gradient(kind, checkpointing):
    s = Setting(kind)
    if checkpointing:
        s.transformer.enable_gradient_checkpointing()
        s.transformer.train()
    loss, _ = T2VUnlearningLoss(guidance_scale=ETA)(*s.inputs, s.preserve, s.anchor, mask=s.mask)
    loss.backward()
    assert_only_the_eraser_has_gradient(s.transformer)
    assert s.transformer.training == checkpointing
    assert not any(layer.bypassed for layer in s.transformer.modules() if hasattr(layer, "bypassed"))


def test_the_gradient_is_that_of_the_formula_with_constant_targets():
    s = Setting()
    parameters = [p for n, p in s.transformer.named_parameters() if "eraser_" in n]
    v_neg = s.v_anchor - ETA * (s.v_concept - s.v_anchor)
    plain = (s.student(s.target) - v_neg).square().mean()
    plain = plain + 0.5 * (s.student(s.preserve) - s.v_preserve).square().mean()
    expected = torch.autograd.grad(plain, parameters)
    loss, _ = T2VUnlearningLoss(guidance_scale=ETA)(*s.inputs, s.preserve, s.anchor)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_one_pass_of_the_teacher_and_one_of_the_student():
    s = Setting()
    calls = count_calls(s.velocity)
    T2VUnlearningLoss()(*s.inputs, s.preserve, s.anchor, mask=s.mask)
    assert calls == [(6, False), (4, True)]


def test_teacher_velocities_made_before_need_no_teacher():
    s = Setting()
    loss_fn = T2VUnlearningLoss(guidance_scale=ETA)
    expected, _ = loss_fn(*s.inputs, s.preserve, s.anchor)
    calls = count_calls(s.velocity)
    known = {"v_concept": s.v_concept, "v_anchor": s.v_anchor, "v_preserve": s.v_preserve}
    found, _ = loss_fn(None, *s.inputs[1:], s.preserve, **known)
    assert calls == [(4, True)]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="`model_original` must be given for velocities not made"):
        loss_fn(None, *s.inputs[1:], s.preserve, v_concept=s.v_concept, v_anchor=s.v_anchor)


def test_known_velocities_carry_no_gradient_into_the_loss():
    s = Setting()
    known = {name: getattr(s, name).clone().requires_grad_() for name in ("v_concept", "v_anchor")}
    loss, _ = T2VUnlearningLoss()(None, *s.inputs[1:], **known)
    loss.backward()
    assert all(velocity.grad is None for velocity in known.values())


def test_a_separate_teacher_gives_the_same_and_no_gradient():
    s, other = Setting(), Setting()
    other.transformer.requires_grad_(True)
    loss_fn = T2VUnlearningLoss(guidance_scale=ETA)
    expected, _ = loss_fn(*s.inputs, s.preserve, s.anchor)
    found, _ = loss_fn(other.velocity, *s.inputs[1:], s.preserve, s.anchor)
    assert found.item() == expected.item()
    found.backward()
    assert all(parameter.grad is None for parameter in other.transformer.parameters())
    assert_only_the_eraser_has_gradient(s.transformer)


def test_preserved_clips_of_their_own():
    s = Setting()
    x_pre, t_pre, embeds = random_rows(3, seed=5)
    loss_fn = T2VUnlearningLoss(unlearning_weight=0.0, preservation_weight=1.0)
    loss, parts = loss_fn(*s.inputs, embeds, x_preserve=x_pre, t_preserve=t_pre)
    student = s.velocity(x_pre, t_pre, embeds)
    with erasers_disabled(s.transformer):
        expected = (student - s.velocity(x_pre, t_pre, embeds)).square().mean()
    torch.testing.assert_close(loss, expected)
    assert not any(name.startswith("unlearning") for name in parts)


def test_eraser_outputs_may_come_from_outside():
    s = Setting()
    with eraser_outputs(s.transformer) as outputs:
        s.student(s.target)
    loss_fn = T2VUnlearningLoss(unlearning_weight=0.0, localization_weight=1.0)
    found, _ = loss_fn(*s.inputs, mask=s.mask, eraser_outputs=outputs)
    torch.testing.assert_close(found, MaskLocalizationLoss()(outputs, s.mask)[0])
    with pytest.raises(ValueError, match="`mask` must be given with `eraser_outputs`"):
        loss_fn(*s.inputs, eraser_outputs=outputs)


def test_misfits_are_refused():
    s = Setting()
    loss_fn = T2VUnlearningLoss()
    with pytest.raises(ValueError, match="must have one text length, got \\[8, 12\\]"):
        loss_fn(*s.inputs, cond_neg=s.anchor[:, :8])
    with pytest.raises(ValueError, match="`prompt_embeds` must be \\(1 or 2, text, text_dim\\)"):
        loss_fn(*s.inputs, cond_neg=torch.zeros(3, 12, 16))
    with pytest.raises(ValueError, match="`mask` must have one value for each of 48 video tokens"):
        loss_fn(*s.inputs, cond_neg=s.anchor, mask=torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match="positive weight needs, got no such term"):
        T2VUnlearningLoss(unlearning_weight=0.0)(*s.inputs)
    with pytest.raises(TypeError, match="`model` must be a CogVideoXVelocity or .*got function"):
        loss_fn(lambda *rows: rows[0], *s.inputs[1:], cond_neg=s.anchor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preservation_weight": -1.0}, "`preservation_weight` must be at least 0, got -1.0"),
        ({"unlearning_weight": float("nan")}, "`unlearning_weight` must be at least 0, got nan"),
        ({"guidance_scale": -0.5}, "`guidance_scale` must be at least 0, got -0.5"),
        ({"loss_type": "huber"}, "`loss_type` must be 'l2' or 'l1', got 'huber'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        T2VUnlearningLoss(**arguments)


def test_other_modules_may_stand_for_the_velocity():
    class Plain(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(value))

        def forward(self, x_t, t, embeds):
            return x_t + self.shift * embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    teacher, student = Plain(1.0), Plain(1.5)
    x_t, t = torch.zeros(2, 3, 4, 4, 4), torch.tensor([1, 2])
    ones = torch.ones(1, 5, 6)
    loss, _ = T2VUnlearningLoss(guidance_scale=ETA)(teacher, student, x_t, t, ones, ones, uncond=0 * ones)
    assert loss.item() == pytest.approx((1.5 + ETA) ** 2 + 0.5 * 0.5**2)
    loss.backward()
    assert teacher.shift.grad is None
    assert student.shift.grad.item() == pytest.approx(2 * (1.5 + ETA) + 0.5)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")])
def test_a_raw_transformer_says_which_call_to_use(wrap):
    s = Setting()
    model, rows = wrap(s.transformer), (s.x_t, s.t, s.target)
    say = r"called as `model\(x_t, t, prompt_embeds\)`.*`CogVideoXVelocity.from_pipeline"
    with pytest.raises(TypeError, match=say):
        T2VUnlearningLoss()(model, model, *rows, cond_neg=s.anchor)
    with pytest.raises(TypeError, match=say):
        NegativelyGuidedVelocityLoss()(None, model, *rows, v_concept=s.x_t, v_anchor=s.x_t)
    with pytest.raises(TypeError, match=say):
        ConceptPreservationLoss()(s.velocity, get_peft_model(tiny_transformer(), EraserConfig(r=2)), *rows)
    with pytest.raises(TypeError, match=r"`eraser_outputs` must be .* Run the transformer within"):
        MaskLocalizationLoss()(model, s.mask)

"""Tests of the objective's pure functions, against plain float64 loops."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.velocity_losses import layer_localization, localization, negative_velocity, velocity_distance


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
    small = localization({"a": torch.ones(1, 4, 2)}, torch.zeros(1, 4))
    large = localization({name: torch.ones(3, 64, 32) for name in "abc"}, torch.zeros(3, 64))
    assert small.item() == large.item() == 1


def test_localization_sees_only_the_background():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    output = torch.randn(1, 4, 3, requires_grad=True)
    localization({"a": output, "b": output}, mask).backward()
    assert (output.grad[:, :2] == 0).all()
    assert (output.grad[:, 2:] != 0).all()
    assert localization({"a": output}, torch.ones(1, 4)).item() == 0


def test_layers_are_averaged():
    mask = torch.zeros(1, 4)
    layers = {"a": random(1, 4, 3), "b": random(1, 4, 3, seed=1)}
    expected = sum(layer_localization(o, mask).item() for o in layers.values()) / 2
    assert localization(layers, mask).item() == pytest.approx(expected)


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
        localization({}, torch.zeros(1, 4))

"""Peers of `edit_concept`, against answers that are known in other ways."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import esd
from benchmarks.baselines.speed import augmented, null_space, null_space_update, speed, unconstrained_shift
from benchmarks.baselines.uce import concept_tokens, unified_concept_edit
from diffusers_ext.nullspace.text_only import denoiser_arguments
from tests.tiny_digits import random_digits_pipeline


def rows(count: int, seed: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


def test_speed_solves_its_constrained_least_squares():
    weight, c1, anchors, c0, c2 = rows(3, 0), rows(4, 1), rows(4, 2), rows(3, 3), rows(2, 4)
    update = null_space_update(weight, c1, anchors, null_space(c0), c2)
    assert (update @ torch.cat([c0, c2]).T).abs().max() < 1e-10
    # All updates that keep both: X B^T, B a basis of what neither holds; ridge regression gives X.
    basis = torch.linalg.svd(torch.cat([c0, c2])).Vh[5:].T
    seen = c1 @ basis
    ridge = torch.linalg.solve(seen.T @ seen + torch.eye(3, dtype=seen.dtype), seen.T @ (anchors - c1) @ weight.T)
    assert torch.allclose(update, ridge.T @ basis.T)


def test_speed_of_one_token_is_half_way():
    unit = torch.eye(4, dtype=torch.float64)
    update = null_space_update(2 * unit, unit[1:2], unit[2:3], null_space(unit[:1]), unit[3:])
    assert torch.allclose(update, torch.outer(unit[2] - unit[1], unit[1]))  # 2 (e2 - e1) e1^T / (1 + 1)


def test_prior_filtering_measures_the_unconstrained_edit():
    unit = torch.eye(4, dtype=torch.float64)
    shifts = unconstrained_shift(unit, 3 * unit[:1], 3 * unit[1:2], torch.stack([unit[2], 3 * unit[0]]))
    assert torch.allclose(shifts, torch.tensor([0.0, 2 * 9 * 0.9**2], dtype=torch.float64))


def test_augmentation_goes_where_the_weight_reads_nothing():
    weight, known = rows(3, 0), rows(2, 1)
    more = augmented(weight, known, 5, torch.Generator().manual_seed(7))
    assert more.shape == (12, 8)
    assert torch.allclose(more @ weight.T, torch.cat([known, known.repeat(5, 1)]) @ weight.T)
    assert (more[2:] - known.repeat(5, 1)).norm(dim=1).min() > 0.01


def test_speed_keeps_the_empty_prompt_and_edits_values(pipeline):
    lora = speed(pipeline, {"three": "nine"}, ["one", "two", "red"])
    names = {name.removesuffix(".lora_B.weight") for name in lora if "lora_B" in name}
    assert names
    assert all(name.endswith("attn2.to_v") for name in names)
    empty = denoiser_arguments(pipeline, [""])["encoder_hidden_states"][0]
    for name in names:
        update = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        assert (update @ empty.T).abs().max() < 1e-4 * update.abs().max()
        assert (update @ concept_tokens(pipeline, "three").float().T).abs().max() > 0.01 * update.abs().max()


def test_uce_solves_its_equation(pipeline):
    lora = unified_concept_edit(pipeline, {"three": "nine"}, ["one", "two"], weight=0.5)
    name = next(name.removesuffix(".lora_A.weight") for name in lora if "lora_A" in name)
    base = pipeline.unet.get_submodule(name.removeprefix("unet.")).weight.double()
    edited = base + lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()
    old, new, *kept = (concept_tokens(pipeline, word) for word in ("three", "nine", "one", "two"))
    kept = torch.cat(kept)
    unit = 0.5 * torch.eye(old.shape[1], dtype=old.dtype)
    wanted = base @ (new.T @ old + unit + kept.T @ kept) @ torch.linalg.inv(old.T @ old + unit + kept.T @ kept)
    assert torch.allclose(edited, wanted, atol=1e-5)


def test_esd_aims_away_from_the_concept():
    told, empty = torch.tensor([3.0]), torch.tensor([1.0])
    assert esd.negative_guidance(told, empty, 1.0) == -1
    assert esd.negative_guidance(told, empty, 0.0) == 1


def test_esd_runs_as_the_pipeline_does(pipeline):
    seen = []

    def keep(_, step, timestep, state):
        seen.append(state["latents"].clone())
        return {}

    pipeline(
        "three", num_inference_steps=3, guidance_scale=3.0, output_type="latent", callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    empty, concept = denoiser_arguments(pipeline, ["", "three"])["encoder_hidden_states"].split(1)
    latents, timestep = esd.partial_run(pipeline, concept, empty, 2, 3, 3.0, torch.Generator().manual_seed(5))
    assert torch.allclose(latents, seen[1], atol=1e-5)
    assert timestep == pipeline.scheduler.timesteps[2]


def test_esd_trains_the_cross_attention_alone():
    pipeline = random_digits_pipeline()
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    (loss,) = esd.erase_by_training(pipeline, ["three"], steps=1, learning_rate=1e-4, num_inference_steps=2)
    changed = {name for name, weight in pipeline.unet.state_dict().items() if not weight.equal(before[name])}
    assert changed
    assert changed <= set(esd.cross_attention_parameters(pipeline.unet))
    (plain,) = esd.erase_by_training(random_digits_pipeline(), ["three"], steps=1, eta=0.0, num_inference_steps=2)
    assert loss == pytest.approx(4 * plain, rel=1e-4)  # |e_c - e_0 + eta (e_c - e_0)|^2, before anything has moved

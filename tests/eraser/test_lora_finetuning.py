"""Tests of plain LoRA fine-tuning of an erased model."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from diffusers_ext.eraser.lora_finetuning import FinetunedLora, finetune_lora
from diffusers_ext.families import find_family
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.eraser.erased_models import erased_pipeline, random_rows
from tests.evaluation.erased_model_states import unchanged
from tests.tiny_current_pipelines import tiny_wan_pipeline


def setting(kind="rotary", clips=6):
    pipeline = erased_pipeline(kind, torch.float32)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    rows = random_rows(clips, 4 if kind == "1.5" else 3, dtype=torch.float32)
    return velocity, pipeline.scheduler, rows


@torch.no_grad()
def own_loss(velocity, scheduler, latents, embeds):
    """The model's loss on one clip at many fixed noises and timesteps."""
    noise, t, _ = random_rows(48, latents.shape[1], seed=9, dtype=torch.float32)
    x_0 = latents.expand_as(noise)
    found = velocity(scheduler.add_noise(x_0, noise, t), t, embeds.expand(48, -1, -1))
    return (found - scheduler.get_velocity(x_0, noise, t)).square().mean().item()


@pytest.mark.parametrize("kind", ["rotary", "absolute", "1.5"])
def test_training_lowers_the_models_own_loss(kind):
    velocity, scheduler, (latents, _, embeds) = setting(kind, clips=1)
    before = own_loss(velocity, scheduler, latents, embeds)
    with unchanged(velocity.model):
        lora = finetune_lora(velocity, scheduler, latents, embeds, steps=25, learning_rate=2e-2)
    with lora:
        assert own_loss(velocity, scheduler, latents, embeds) < 0.95 * before


def test_the_loss_is_the_squared_error_of_the_velocity():
    velocity, scheduler, (latents, _, embeds) = setting(clips=1)
    lora = finetune_lora(velocity, scheduler, latents, embeds, steps=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    for down, _ in lora.weights.values():
        torch.empty(down.shape).uniform_(generator=generator)
    torch.randperm(1, generator=generator)
    t = torch.randint(1000, (1,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    alpha = scheduler.alphas_cumprod[t].float()
    x_t = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
    v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents
    with torch.no_grad():
        expected = (velocity(x_t, t, embeds) - v).square().mean().item()
    assert lora.losses == [pytest.approx(expected, rel=1e-5)]


def test_flow_matching_is_trained_on_straight_paths():
    pipeline = tiny_wan_pipeline()
    velocity = find_family(pipeline).velocity(pipeline, 5, 32, 32)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 2, 4, 4, 4, generator=generator)
    embeds = torch.randn(1, 512, 32, generator=generator)
    lora = finetune_lora(velocity, pipeline.scheduler, latents, embeds, steps=1, seed=3)
    assert {name.split(".")[2] for name in lora.layers} == {"attn1", "attn2"}
    generator = torch.Generator().manual_seed(3)
    for down, _ in lora.weights.values():
        torch.empty(down.shape).uniform_(generator=generator)
    torch.randperm(1, generator=generator)
    sigma = torch.randint(1000, (1,), generator=generator) / 1000
    noise = torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        found = velocity((1 - sigma) * latents + sigma * noise, 1000 * sigma, embeds)
    assert lora.losses == [pytest.approx((found - (noise - latents)).square().mean().item(), rel=1e-5)]


def test_it_is_in_effect_only_inside_its_context():
    velocity, scheduler, (latents, t, embeds) = setting()
    with torch.no_grad():
        before = velocity(latents, t, embeds)
        lora = finetune_lora(velocity, scheduler, latents, embeds, steps=2)
        assert torch.equal(velocity(latents, t, embeds), before)
        with unchanged(velocity.model), lora:
            inside = velocity(latents, t, embeds)
            lora.__exit__(None, None, None)
        with lora:
            assert torch.equal(velocity(latents, t, embeds), inside)
            with pytest.raises(ValueError, match="must be opened once"), lora:
                pass
        assert not torch.equal(inside, before)
        assert torch.equal(velocity(latents, t, embeds), before)


@torch.no_grad()
def test_inside_it_is_the_model_with_changed_weights():
    velocity, scheduler, (latents, t, embeds) = setting()
    lora = finetune_lora(velocity, scheduler, latents, embeds, steps=2, rank=4, alpha=8)
    assert len(lora.weights) == 8
    with lora:
        expected = velocity(latents, t, embeds)
    for name, (down, up) in lora.weights.items():
        assert up.abs().sum() > 0
        velocity.model.get_submodule(name).weight += 2 * up @ down
    torch.testing.assert_close(velocity(latents, t, embeds), expected)


def test_the_seed_alone_decides():
    velocity, scheduler, (latents, _, embeds) = setting()
    arguments = (velocity, scheduler, latents, embeds)
    torch.manual_seed(5)
    first = finetune_lora(*arguments, steps=3)
    torch.manual_seed(6)
    again = finetune_lora(*arguments, steps=3)
    assert first.losses == again.losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, again.parameters))
    assert finetune_lora(*arguments, steps=3, seed=1).losses != first.losses


def test_the_model_comes_back_after_an_exception():
    velocity, scheduler, (latents, _, embeds) = setting()
    velocity.model.train()
    with unchanged(velocity.model), pytest.raises(ValueError, match="`prompt_embeds` must be"):
        finetune_lora(velocity, scheduler, latents, embeds[..., :8])


def test_a_model_in_low_precision_keeps_its_dtype():
    velocity, scheduler, (latents, t, embeds) = setting()
    velocity.model.to(torch.bfloat16)
    lora = finetune_lora(velocity, scheduler, latents, embeds, steps=2)
    assert {weight.dtype for weight in lora.parameters} == {torch.float32}
    with lora, torch.no_grad():
        assert velocity(latents, t, embeds).isfinite().all()


def test_bad_input_is_refused():
    velocity, scheduler, (latents, _, embeds) = setting()
    with pytest.raises(ValueError, match="one row per clip .* got 5 and 6"):
        finetune_lora(velocity, scheduler, latents, embeds[:5])
    with pytest.raises(ValueError, match="one row per clip .* got 0 and 0"):
        finetune_lora(velocity, scheduler, latents[:0], embeds[:0])
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        finetune_lora(velocity, scheduler, latents, embeds, steps=0)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        finetune_lora(velocity, scheduler, latents, embeds, rank=0)
    with pytest.raises(ValueError, match="'v_prediction', got 'epsilon'"):
        finetune_lora(velocity, CogVideoXDDIMScheduler(prediction_type="epsilon"), latents, embeds)
    with pytest.raises(ValueError, match="must match Linear layers, got .*norm1, a CogVideoX"):
        finetune_lora(velocity, scheduler, latents, embeds, targets="*.norm1")
    velocity.model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="`model` must not have fused projections"):
        FinetunedLora(velocity.model, 4, 4, "*.to_q", torch.Generator(), torch.device("cpu"))

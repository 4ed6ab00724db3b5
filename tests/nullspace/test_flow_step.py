"""The training step of flow-matching models against diffusers' own scripts, at fixed noise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.families.text_conditioning import TextConditioning, stack_texts
from diffusers_ext.nullspace.settings import WEIGHTING_SCHEMES
from diffusers_ext.nullspace.step import Condition, DreamBoothLoss, flow_schedule, schedule_of
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_sd3_pipeline

SIZE = (3, 16, 8, 8)


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def flux():
    return tiny_flux_pipeline()


def condition_of(pipeline, prompt: str = "a red seven") -> Condition:
    family = find_family(pipeline)
    with torch.no_grad():
        return Condition(family.encode(pipeline, [prompt], None).positive(), family, pipeline)


def batch_and_noise(seed: int = 0):
    """Mean and standard deviation, the latents that the loss draws of them, and its noise."""
    mean = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    latents = mean + 0.1 * torch.randn(SIZE, generator=generator)
    return [mean, torch.full_like(mean, 0.1)], latents, torch.randn(SIZE, generator=generator), generator


def reference_loss(predict, scheduler, scheme, latents, noise, generator) -> torch.Tensor:
    """As `train_dreambooth_lora_sd3.py` and `train_dreambooth_lora_flux.py` have it, from their variables on."""
    u = compute_density_for_timestep_sampling(
        scheme, len(latents), logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas[steps].flatten().view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    errors = weighting.float() * (predict(noisy, timesteps).float() - (noise - latents).float()) ** 2
    return errors.reshape(len(latents), -1).mean(1).mean()


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_the_loss_of_sd3_is_that_of_diffusers(sd3, scheme):
    batch, latents, noise, generator = batch_and_noise()
    condition = condition_of(sd3)
    text = condition.text.expand(3)

    def predict(noisy, timesteps):
        return sd3.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            return_dict=False,
        )[0]

    schedule = schedule_of(sd3, condition.family, 32, weighting_scheme=scheme)
    assert torch.equal(schedule.sigmas, sd3.scheduler.sigmas)  # shift 3
    with torch.no_grad():
        found = DreamBoothLoss(schedule, condition)(sd3.transformer, batch, torch.Generator().manual_seed(0))
        wanted = reference_loss(predict, sd3.scheduler, scheme, latents, noise, generator)
    torch.testing.assert_close(found["loss"], wanted)


def test_the_loss_of_flux_is_that_of_diffusers(flux):
    batch, latents, noise, generator = batch_and_noise()
    condition = condition_of(flux)
    text = condition.text.expand(3)

    def predict(noisy, timesteps):
        ids = flux._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32)
        packed = flux._pack_latents(noisy, 3, 16, 8, 8)
        output = flux.transformer(
            hidden_states=packed,
            timestep=timesteps / 1000,
            guidance=torch.tensor([3.5]).expand(3),
            pooled_projections=text.pooled_prompt_embeds,
            encoder_hidden_states=text.prompt_embeds,
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return flux._unpack_latents(output, 32, 32, flux.vae_scale_factor)

    plain = FlowMatchEulerDiscreteScheduler()  # the script leaves a dynamic shift out
    schedule = flow_schedule(condition.family, plain, 16, weighting_scheme="none")
    with torch.no_grad():
        found = DreamBoothLoss(schedule, condition)(flux.transformer, batch, torch.Generator().manual_seed(0))
        wanted = reference_loss(predict, plain, "none", latents, noise, generator)
    torch.testing.assert_close(found["loss"], wanted)


@pytest.mark.parametrize(("tokens", "kind"), [(256, "exponential"), (4096, "exponential"), (4096, "linear")])
def test_a_dynamic_shift_is_that_of_a_run_of_this_size(flux, tokens, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    family = find_family(flux)
    found = flow_schedule(family, scheduler, tokens).sigmas
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **{"mu": 0.5 if tokens == 256 else 1.15})
    torch.testing.assert_close(found[::250], scheduler.sigmas[:4], rtol=1e-5, atol=1e-6)
    assert family.grid_arguments(scheduler.config, 4, tokens)["mu"] == pytest.approx(0.5 if tokens == 256 else 1.15)


def test_schedulers_of_flow_matching(flux):
    family = find_family(flux)
    multistep = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert flow_schedule(family, multistep, 16).sigmas[500].item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match="`scheduler` must be a flow-matching one for Flux, got a DDIMScheduler"):
        flow_schedule(family, DDIMScheduler(), 16)
    with pytest.raises(ValueError, match="`weighting_scheme` must be one of"):
        flow_schedule(family, multistep, 16, weighting_scheme="uniform")
    with pytest.raises(ValueError, match="`snr_gamma` must be None for a flow-matching model, got 5.0"):
        DreamBoothLoss(flow_schedule(family, multistep, 16), condition_of(flux), snr_gamma=5.0)


def test_levels_are_drawn_around_the_shifted_middle(sd3):
    schedule = schedule_of(sd3, find_family(sd3), 32)
    zeros = torch.zeros(4000, 1)
    noised = schedule.noised(zeros, torch.ones_like(zeros), torch.Generator().manual_seed(0))
    assert noised.latents.median().item() == pytest.approx(0.75, abs=0.01)  # 3 / (1 + 3) of the middle
    assert torch.equal(noised.timesteps, 1000 * noised.latents[:, 0])
    logits = torch.log(noised.latents / (1 - noised.latents))
    assert logits.mean().item() == pytest.approx(math.log(3), abs=0.05)  # a shift moves the mean of the logits
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_a_wrapped_model_is_called_and_its_config_read(flux):
    class Wrapper(torch.nn.parallel.DataParallel):
        def forward(self, **inputs):
            calls.append(inputs)
            return self.module(**inputs)

    calls, condition = [], condition_of(flux)
    latents, t = torch.randn(SIZE), torch.tensor([100.0, 500.0, 900.0])
    with torch.no_grad():
        wanted = condition.predict(flux.transformer, latents, t, condition.of_samples(3, None))
        found = condition.predict(Wrapper(flux.transformer), latents, t, condition.of_samples(3, None))
    assert torch.equal(found, wanted)
    assert len(calls) == 1
    assert calls[0]["guidance"].tolist() == [3.5] * 3
    assert denoiser_of(flux) is flux.transformer


def test_texts_of_several_lengths_need_masks():
    embeds = [torch.ones(1, length, 2) for length in (3, 5)]
    with pytest.raises(ValueError, match=r"of one length or have masks, got `prompt_embeds` of lengths \[3, 5\]"):
        stack_texts([TextConditioning(x) for x in embeds])
    text = stack_texts([TextConditioning(x, attention_mask=torch.ones(x.shape[:2])) for x in embeds])
    assert text.attention_mask.sum(1).tolist() == [3, 5]
    assert text.prompt_embeds[0].sum(1).tolist() == [2, 2, 2, 0, 0]
    negative = TextConditioning(embeds[0], torch.zeros(1, 3, 2))
    assert negative.positive().tensors().keys() == {"prompt_embeds"}
    assert negative.expand(4).prompt_embeds.shape == (4, 3, 2)


def test_an_object_without_sigmas_is_no_flow_scheduler(flux):
    with pytest.raises(ValueError, match="flow-matching"):
        flow_schedule(find_family(flux), SimpleNamespace(config={}), 16)

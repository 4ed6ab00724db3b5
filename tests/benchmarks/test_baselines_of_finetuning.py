"""Peers of null-space training, against what their equations say of one layer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.baselines.finetuning import ADAPTERS, OutputPreservation, adapters_off, drawn_latents, finetune
from benchmarks.baselines.intruders import reduce_intruders
from diffusers_ext.core.seeds import training_schedule
from diffusers_ext.nullspace.step import DreamBoothLoss
from diffusers_ext.training.nullspace.data import encode_conditions
from tests.tiny_digits import random_digits_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
PICTURES = TensorDataset(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))


def trained(name: str, rate: float = 1e-2, steps: int = 3, **arguments):
    """Update of one Linear after a few steps, and its old weight."""
    pipeline = random_digits_pipeline()
    old = pipeline.unet.get_submodule(LAYER).weight.clone()
    finetune(pipeline, ADAPTERS[name](), PICTURES, "a photo of sks", rate, steps=steps, batch_size=2, **arguments)
    layer = pipeline.unet.get_submodule(LAYER)
    with torch.no_grad():
        unit = torch.eye(old.shape[1])
        update = (layer(unit)).T - old
        with adapters_off(pipeline.unet):
            assert torch.allclose(layer(unit).T, old, atol=1e-6)
    assert update.norm() > 1e-4 * old.norm()
    return update, old


def test_mica_moves_outputs_along_minor_components_alone():
    update, old = trained("MiCA")
    left = torch.linalg.svd(old, full_matrices=False).U
    assert (left[:, :-8].T @ update).norm() < 1e-5 * update.norm()


def test_oft_rotates_the_weight():
    update, old = trained("OFT", 5e-3)
    new, old = (weight.T @ weight for weight in (old + update, old))
    assert new.trace().item() == pytest.approx(old.trace().item(), rel=1e-3)
    values = [torch.linalg.eigvalsh(moment)[-20:] for moment in (new, old)]
    assert torch.allclose(*values, rtol=1e-2)  # PEFT rotates by a series of five terms
    assert (new - old).norm() > 0.01 * old.norm()


def test_osf_keeps_the_upper_singular_directions():
    update, old = trained("OSF", 1e-3)
    left, values, right = torch.linalg.svd(old, full_matrices=False)
    half = len(values) // 2
    kept = left[:, :half].T @ (old + update) @ right[:half].T
    assert torch.allclose(kept, values[:half].diag(), atol=2e-3 * values[0].item())


def test_output_preservation_is_what_the_adapter_changes():
    pipeline = random_digits_pipeline()
    loss = DreamBoothLoss(training_schedule(pipeline.scheduler), encode_conditions(pipeline, ["sks"]))
    latents = drawn_latents(pipeline, ["a red three", "a blue four"], seed=0, num_inference_steps=2)
    captions = encode_conditions(pipeline, ["a red three", "a blue four"])
    preserving = OutputPreservation(loss, latents, captions, 10.0)
    finetune(pipeline, ADAPTERS["LoRA"](), PICTURES, "a photo of sks", 1e-1, steps=2, batch_size=2)
    batch = list(PICTURES[:2])
    with torch.no_grad():
        found = preserving(pipeline.unet, batch, torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
        instance = loss(pipeline.unet, batch, generator)["loss"]
        picked = torch.randint(2, (2,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (2,), generator=generator)
        noisy = loss.scheduler.add_noise(latents[picked], noise, timesteps)
        embeds = captions.text.prompt_embeds[picked]
        moved = pipeline.unet(noisy, timesteps, embeds).sample
        base = random_digits_pipeline().unet(noisy, timesteps, embeds).sample
    assert found["preservation"].item() == pytest.approx((moved - base).square().mean().item(), rel=1e-4)
    assert found["preservation"] > 0
    assert found["loss"].item() == pytest.approx((instance + 10 * found["preservation"]).item())


def test_an_intruder_is_shrunk_and_what_resembles_the_weight_stays():
    pipeline = random_digits_pipeline()
    linear = pipeline.unet.get_submodule(LAYER)
    left = torch.linalg.qr(torch.randn(linear.out_features, linear.out_features, generator=torch.Generator())).Q
    right = torch.linalg.qr(torch.randn(linear.in_features, linear.in_features, generator=torch.Generator())).Q
    values = torch.linspace(2, 1, 8)
    linear.weight.data = left[:, :8] * values @ right[:, :8].T
    new = torch.outer(left[:, 20], right[:, 20])
    lora = {f"unet.{LAYER}.lora_A.weight": 9 * right[:, 20:21].T, f"unet.{LAYER}.lora_B.weight": left[:, 20:21]}
    reduced = reduce_intruders(pipeline, lora, 0.75)
    update = reduced[f"unet.{LAYER}.lora_B.weight"] @ reduced[f"unet.{LAYER}.lora_A.weight"]
    assert torch.allclose(update, 0.75 * 9 * new, atol=1e-4)
    alike = {f"unet.{LAYER}.lora_A.weight": 9 * right[:, :1].T, f"unet.{LAYER}.lora_B.weight": left[:, :1]}
    kept = reduce_intruders(pipeline, alike, 0.75)
    update = kept[f"unet.{LAYER}.lora_B.weight"] @ kept[f"unet.{LAYER}.lora_A.weight"]
    assert torch.allclose(update, 9 * torch.outer(left[:, 0], right[:, 0]), atol=1e-4)

from __future__ import annotations

import pytest
import torch

from benchmarks.measured_memory import peak_bytes
from diffusers_ext.core.memory_trace import MemoryTrace
from diffusers_ext.eraser.component_memory import (
    text_encoder_memory,
    vae_memory,
)
from diffusers_ext.families.published import T5_XXL
from tests.tiny_cogvideox import tiny_vae, tiny_video_pipeline


def test_the_published_text_encoder_has_its_size():
    memory = text_encoder_memory(T5_XXL[1], 1, 16, torch.bfloat16)
    assert memory.weights == 2 * 4_762_310_656


@torch.no_grad()
def test_text_is_encoded_in_the_memory_that_was_said():
    encoder = tiny_video_pipeline().text_encoder
    ids = torch.zeros(64, 32, dtype=torch.long)
    measured = peak_bytes(lambda: encoder(ids))
    traced = text_encoder_memory(encoder.config.to_dict(), 64, 32, torch.float32)
    assert traced.weights == sum(p.nbytes for p in encoder.parameters())
    assert traced.activations == pytest.approx(measured, rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("decodes", [False, True])
def test_the_vae_takes_what_was_said(decodes):
    vae = tiny_vae()
    latents, clip = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 3, 9, 32, 32)

    def run():
        result = vae.decode(latents) if decodes else vae.encode(clip)
        assert result is not None

    traced = vae_memory(dict(vae.config), 9, 32, 32, torch.float32, decodes=decodes)
    assert traced.weights == sum(p.nbytes for p in vae.parameters())
    with MemoryTrace([*vae.parameters(), *vae.buffers(), latents, clip]) as trace:
        run()
    inputs = latents.nbytes if decodes else clip.nbytes
    assert traced.activations == pytest.approx(trace.peak + inputs, rel=0.05)
    # Not more: the CPU's convolutions unfold their input, which a GPU's need not.
    assert traced.activations < peak_bytes(run) + inputs

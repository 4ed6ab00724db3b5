from __future__ import annotations

import pytest
import torch
from accelerate import disk_offload

from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.golden_noise.golden_pipelines import FAMILIES, NETWORKS, PROMPTS, draw, golden_pipeline

every_family = pytest.mark.parametrize("family", FAMILIES)
every_network = pytest.mark.parametrize("network", NETWORKS)


def count_forwards(pipeline) -> list[int]:
    """Grows by one whenever the network's `forward` is called as a module's, with its hooks."""
    calls = []
    pipeline.noise_model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@every_family
def test_the_network_is_offloaded_after_the_text_encoders_and_before_the_denoiser(family):
    golden = FAMILIES[family].golden
    order = golden.model_cpu_offload_seq.split("->")
    (plain,) = (base for base in golden.__bases__ if base.__name__ != "GoldenNoiseMixin")
    assert [name for name in order if name != "noise_model"] == (plain.model_cpu_offload_seq.split("->"))
    place = order.index("noise_model")
    assert order[place + 1] in ("unet", "transformer")
    pipeline = golden_pipeline(family)
    picture = draw(pipeline, family)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert draw(pipeline, family).equal(picture)


@every_network
def test_model_offloading_brings_every_network_in_by_its_hook(network, monkeypatch):
    pipeline = golden_pipeline("sd", name=network)
    picture = draw(pipeline, "sd")
    pipeline.enable_model_cpu_offload(device="cpu")
    hook = pipeline.noise_model._hf_hook
    brought, before = [], hook.pre_forward
    monkeypatch.setattr(hook, "pre_forward", lambda *a, **k: brought.append(1) or before(*a, **k))
    assert draw(pipeline, "sd").equal(picture)
    assert brought
    brought.clear()
    draw(pipeline, "sd", golden_noise_scale=0)
    assert not brought


@every_network
def test_sequential_offloading_brings_every_network_in_part_by_part(network, tmp_path):
    pipeline = golden_pipeline("sd", name=network)
    text = encode_prompts(pipeline, PROMPTS)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = pipeline.noise_model
    golden = network.refine(noise, text.prompt_embeds)
    # As `enable_sequential_cpu_offload` does, from the disk to the CPU and not from there to a GPU.
    disk_offload(network, tmp_path, torch.device("cpu"), offload_buffers=bool(network._parameters))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    torch.testing.assert_close(network.refine(noise, text.prompt_embeds), golden)


@every_network
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_reads_every_network_from_the_disk(network, level, tmp_path):
    pipeline = golden_pipeline("sd", name=network)
    picture = draw(pipeline, "sd")
    pipeline.noise_model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
        offload_to_disk_path=str(tmp_path),
    )
    torch.testing.assert_close(draw(pipeline, "sd"), picture, rtol=0, atol=1e-4)


@every_network
def test_refining_ends_in_the_forward_of_the_module(network):
    pipeline = golden_pipeline("sd", name=network)
    calls = count_forwards(pipeline)
    draw(pipeline, "sd")
    assert calls

"""Pipelines of joint models that carry statistics: saved, loaded, and preserving at run time."""

from __future__ import annotations

import json

import pytest
import torch

import diffusers_ext
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.families import find_family
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothZImagePipeline
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
    tiny_flux2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_image_pipelines import tiny_chroma_pipeline, tiny_flux_pipeline, tiny_sd3_pipeline

KNOWN = "a red seven"
BUILDS = [
    tiny_sd3_pipeline, tiny_flux_pipeline, tiny_flux2_pipeline, tiny_qwen_image_pipeline, tiny_z_image_pipeline,
    tiny_wan_pipeline, tiny_chroma_pipeline, tiny_auraflow_pipeline,
]  # fmt: skip


def drawn(pipeline, prompt: str = KNOWN) -> torch.Tensor:
    run = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "return_dict": False}
    run |= find_family(pipeline).call_arguments
    with quiet_run(pipeline):
        return pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **run)[0]


def lora_of(statistics) -> dict[str, torch.Tensor]:
    """Of rank 2 on every Linear that statistics cover, of an effect that is seen."""
    lora, generator = {}, torch.Generator().manual_seed(0)
    for name, module in statistics.items():
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    return lora


@pytest.mark.parametrize("build", BUILDS)
def test_statistics_go_with_every_pipeline(build, tmp_path):
    stock = build()
    own = getattr(diffusers_ext, find_family(stock).nullspace_pipeline)
    statistics = collect_statistics(stock, [KNOWN], scope="text_only", expand_sub_phrases=False)
    pipeline = own.from_pipe(stock, statistics=statistics)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["_class_name"], index["statistics"]) == (own.__name__, ["diffusers_ext", "FeatureStatistics"])
    loaded = own.from_pretrained(tmp_path)
    assert loaded.statistics.facts == statistics.facts
    # But for where tensors lie in memory, which rounds some products otherwise.
    torch.testing.assert_close(drawn(loaded), drawn(stock), rtol=1e-3, atol=1e-4)
    plain = type(stock).from_pretrained(tmp_path)
    assert type(plain) is type(stock)


def test_a_lora_of_z_image_is_kept_from_preserved_prompts_at_run_time(tmp_path):
    stock = tiny_z_image_pipeline()
    statistics = collect_statistics(stock, [KNOWN], scope="text_only", expand_sub_phrases=False)
    pipeline = NullSpaceDreamBoothZImagePipeline.from_pipe(stock, statistics=statistics)
    before = drawn(pipeline)
    names = ["cap_embedder.1"]
    lora = lora_of({name: pipeline.transformer.get_submodule(name) for name in names})
    pipeline.load_lora_weights(lora)
    free = drawn(pipeline)
    with pipeline.preserve(damping=1e-7) as processor:
        kept = drawn(pipeline)
        processor.strength = 0.0
        torch.testing.assert_close(drawn(pipeline), free, rtol=1e-3, atol=1e-4)
    assert (kept - before).norm() < 0.01 * (free - before).norm()
    torch.testing.assert_close(drawn(pipeline), free, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())
    layers = {key.removeprefix("transformer."): tensor for key, tensor in lora.items()}
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

"""Preserved prompts keep their outputs under a hard edit: in every family, in stock diffusers, loaded and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext.nullspace.edit import EditedConcepts, edit_concept
from diffusers_ext.nullspace.edit_prompts import ConceptEdit
from diffusers_ext.nullspace.lora_files import read_lora
from diffusers_ext.nullspace.text_only import text_readers
from tests.tiny_current_pipelines import (
    tiny_flux2_pipeline,
    tiny_ltx2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import (
    tiny_chroma_pipeline,
    tiny_flux_pipeline,
    tiny_hunyuan_dit_pipeline,
    tiny_sd3_pipeline,
)
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ["a nine", "", "a three"]  # two preserved ones, and the edited one


class Setting(NamedTuple):
    """A family's tiny pipeline, and what its calls need besides prompts and sizes, all of them or those that draw."""

    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    draw: dict[str, Any] = {}


def hunyuan_dit_pipeline() -> DiffusionPipeline:
    """With padding that is one vector in place of 333, which would fill the space."""
    pipeline = tiny_hunyuan_dit_pipeline(text_width=32)
    torch.nn.init.zeros_(pipeline.text_encoder.embeddings.position_embeddings.weight)
    torch.nn.init.zeros_(
        pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )
    torch.nn.init.ones_(pipeline.transformer.text_embedding_padding)
    return pipeline


FAMILIES = {
    "sd": Setting(random_digits_pipeline, {}),
    "sdxl": Setting(sdxl_pipeline, {}),
    "sd3": Setting(lambda: tiny_sd3_pipeline(text_width=96), {"max_sequence_length": 16}),
    "hunyuan_dit": Setting(hunyuan_dit_pipeline, {"use_resolution_binning": False}),
    "flux": Setting(tiny_flux_pipeline, {}),
    "flux2": Setting(tiny_flux2_pipeline, {"max_sequence_length": 16}),
    "chroma": Setting(lambda: tiny_chroma_pipeline(text_width=96), {"max_sequence_length": 16}),
    "qwen_image": Setting(tiny_qwen_image_pipeline, {}, {"negative_prompt": ["", "", ""]}),
    "z_image": Setting(tiny_z_image_pipeline, {}),
    "ltx2": Setting(tiny_ltx2_pipeline, {"max_sequence_length": 16, "num_frames": 1, "height": 32, "width": 32}),
    "wan": Setting(tiny_wan_pipeline, {"num_frames": 5}),
}


def edited(name: str) -> EditedConcepts:
    setting = FAMILIES[name]
    edit = ConceptEdit("three", "nine", prompts=["a three"])
    return edit_concept(setting.build(), [edit], ["a nine"], hard=True, expand_sub_phrases=False, **setting.call)


def outputs(pipeline: DiffusionPipeline, call: dict[str, Any]) -> list[torch.Tensor]:
    """Of every prompt, at two latents of two sizes, each after steps at two timesteps."""
    found = []
    for seed, width in ((0, 32), (1, 64)):
        generators = [torch.Generator().manual_seed(seed) for _ in PROMPTS]
        size = {"height": 32, "width": width, "num_inference_steps": 2, "output_type": "latent"}
        # A copy, because Z-Image's pipeline writes its chat template into the list.
        run = {"prompt": list(PROMPTS), "generator": generators, **call, **size}
        parts = pipeline(**run, return_dict=False)  # LTX-2's sound is the second
        found += [part for part in parts if isinstance(part, torch.Tensor)]
    return found


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
    """The relative change of each prompt's outputs, the largest of all runs."""
    ratios = [(b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) for a, b in zip(before, after)]
    return torch.stack(ratios).amax(0)


def assert_exact(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    ratios = moved(before, after)
    assert ratios[:2].max() < 1e-5, ratios
    assert ratios[2] > 1e-4, ratios


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"hunyuan_dit"}))
def test_a_saved_edit_leaves_preserved_prompts_alone_in_stock_diffusers(name, tmp_path):
    call = {**FAMILIES[name].call, **FAMILIES[name].draw}
    edited(name).save(tmp_path)
    pipeline = FAMILIES[name].build()
    modules = text_readers(pipeline)
    state = {key: value.clone() for key, value in modules.state_dict().items()}
    before = outputs(pipeline, call)

    pipeline.load_lora_weights(tmp_path)
    assert_exact(before, outputs(pipeline, call))
    pipeline.unload_lora_weights()
    assert modules.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in modules.state_dict().items())
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(components=pipeline._lora_loadable_modules)
    pipeline.unload_lora_weights()
    assert_exact(before, outputs(pipeline, call))


def test_hunyuan_dit_which_diffusers_loads_no_lora_into_takes_the_saved_edit_in_its_weights(tmp_path):
    setting = FAMILIES["hunyuan_dit"]
    edited("hunyuan_dit").save(tmp_path)
    pipeline = setting.build()
    assert not hasattr(pipeline, "load_lora_weights")
    before = outputs(pipeline, setting.call)
    lora = read_lora(tmp_path)
    for key, a in lora.items():
        if key.endswith(".lora_A.weight"):
            linear = pipeline.transformer.get_submodule(
                key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            )
            linear.weight.data += lora[key.replace("lora_A", "lora_B")] @ a
    assert_exact(before, outputs(pipeline, setting.call))


@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_an_anchor_of_more_tokens_is_reached_in_texts_of_any_length(name):
    setting = FAMILIES[name]
    edit = ConceptEdit("three", "red nine", prompts=["a three", "a photo of the three"])
    how = {"preserve_weight": 1e-4, "eps": 1e-8, "kept": 1.0, "expand_sub_phrases": False}
    first = edit_concept(setting.build(), [edit], ["a blue one"], **how, **setting.call).report.layers[0]
    assert first["achieved"] > 0.95, first

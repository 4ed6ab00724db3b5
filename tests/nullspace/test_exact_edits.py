"""Preserved prompts keep their outputs in every family, in stock diffusers: under hard edits and debleeded LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict

from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.debleed import debleed_lora, preserved_energy, uncovered_modules, with_text_encoders
from diffusers_ext.nullspace.edit import EditedConcepts, edit_concept
from diffusers_ext.nullspace.edit_prompts import ConceptEdit
from diffusers_ext.nullspace.text_only import text_readers
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
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
from tests.tiny_lora import add_random_lora
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
    "flux": Setting(lambda: tiny_flux_pipeline(text_width=96), {}),
    "flux2": Setting(tiny_flux2_pipeline, {"max_sequence_length": 16}),
    "chroma": Setting(lambda: tiny_chroma_pipeline(text_width=96), {"max_sequence_length": 16}),
    "auraflow": Setting(tiny_auraflow_pipeline, {"max_sequence_length": 16}),
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
    edit = edited(name)
    edit.save(tmp_path)
    assert read_lora(tmp_path).keys() == edit.lora.keys()
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


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "z_image"])
def test_an_anchor_of_more_tokens_is_reached_in_texts_of_any_length(name):
    setting = FAMILIES[name]
    edit = ConceptEdit("three", "red nine", prompts=["a three", "a photo of the three"])
    how = {"preserve_weight": 1e-4, "eps": 1e-8, "kept": 1.0, "expand_sub_phrases": False}
    first = edit_concept(setting.build(), [edit], ["a blue one"], **how, **setting.call).report.layers[0]
    assert first["achieved"] > 0.95, first


@pytest.mark.parametrize("name", ["auraflow", "chroma", "flux", "flux2", "qwen_image", "sd3", "wan", "z_image"])
def test_a_lora_that_stock_diffusers_wrote_is_debleeded_for_it(name, tmp_path):
    setting = FAMILIES[name]
    trained, pipeline, call = setting.build(), setting.build(), {**setting.call, **setting.draw}
    statistics = collect_statistics(pipeline, PROMPTS[:1], scope="text_only", expand_sub_phrases=False)
    add_random_lora(trained.transformer, statistics.linears)
    trained.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer),
        transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
    )
    assert uncovered_modules(tmp_path, statistics) == []
    quiet = tmp_path / "quiet" / "lora.safetensors"
    debleed_lora(
        tmp_path, statistics, pipeline=pipeline, instance_prompts=PROMPTS[2:], strictness=1e3, output_path=quiet
    )
    energies = [sum(preserved_energy(file, statistics).values()) for file in (tmp_path, quiet)]
    assert energies[1] < 0.05 * energies[0]
    before, changes = outputs(pipeline, call), []
    for file in (tmp_path, quiet):
        tuned = setting.build()
        tuned.load_lora_weights(file)
        changes.append(moved(before, outputs(tuned, call)))
    assert (changes[1][:2] < 0.5 * changes[0][:2]).all(), changes
    assert changes[1][2] > changes[1][0], changes


def test_a_lora_of_t5_keeps_the_embeddings_of_preserved_prompts():
    pipeline = tiny_flux_pipeline()
    t5 = pipeline.text_encoder_2
    # So that all padding of a prompt is one vector, which leaves room.
    torch.nn.init.zeros_(t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    generator, lora, linears = torch.Generator().manual_seed(0), {}, {}
    for name, linear in t5.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linears[f"text_encoder_2.{name}"] = linear
            lora[f"text_encoder_2.{name}.lora_A.weight"] = torch.randn(2, linear.in_features, generator=generator)
            lora[f"text_encoder_2.{name}.lora_B.weight"] = torch.randn(linear.out_features, 2, generator=generator) / 4
    statistics = collect_statistics(pipeline, PROMPTS[:1], scope="text_only", expand_sub_phrases=False)
    known = with_text_encoders(statistics, pipeline, lora)
    assert uncovered_modules(lora, known) == []
    ends = {key.removeprefix("text_encoder_2.encoder.block.0.layer.") for key in known.moments if ".block.0." in key}
    assert {"0.SelfAttention.k|q|v", "0.SelfAttention.o", "1.DenseReluDense.wo"} <= ends
    quiet = debleed_lora(lora, statistics, pipeline=pipeline, text_encoders=True, energy=0)

    def embeddings() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.encode_prompt(PROMPTS, None)[0]

    before, weights = embeddings(), {name: linear.weight.detach().clone() for name, linear in linears.items()}
    found = []
    for tensors in (lora, quiet):
        for name, linear in linears.items():
            linear.weight.data = weights[name] + tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        found.append(moved([before], [embeddings()]))
    assert found[0].min() > 1e-2
    assert_exact([before], [embeddings()])

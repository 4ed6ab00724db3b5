"""DreamBooth of flow-matching models from the command line, whose LoRAs stock diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.core.settings import OPTIMIZERS
from diffusers_ext.evaluation.forgetting import evaluate_forgetting
from diffusers_ext.families import find_family
from diffusers_ext.families.lora_files import check_loaded_lora
from diffusers_ext.nullspace.debleed import debleed_lora, preserved_energy, uncovered_modules
from diffusers_ext.nullspace.settings import QUANTIZATIONS
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace import knowledge as knowledge_of_runs
from diffusers_ext.training.nullspace.run import check_against_model, main, parse_args
from diffusers_ext.training.nullspace.subject import files_for_programs
from diffusers_ext.training.run.base_model import quantization_arguments
from diffusers_ext.training.run.optimizers import make_optimizer
from tests.nullspace.test_edit_equations import Linear4bit
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
    tiny_flux2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_chroma_pipeline, tiny_flux_pipeline, tiny_sd3_pipeline
from tests.training.conftest import KNOWN, reset_accelerator

LORA = "pytorch_lora_weights.safetensors"
BUILD = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "chroma": tiny_chroma_pipeline,
    "auraflow": tiny_auraflow_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
    "z_image": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Folders of the tiny models, all but one in half precision."""
    folder = tmp_path_factory.mktemp("bases")
    for name, build in BUILD.items():
        build().to(torch.float32 if name == "sd3" else torch.float16).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def sd3_run(bases, line_to, tmp_path_factory) -> Path:
    """A training of SD3 with all that is usual."""
    reset_accelerator()
    run = {"pretrained_model_name_or_path": bases / "sd3", "max_train_steps": 3, "checkpointing_steps": 2}
    run["lr_scheduler"] = "constant"
    folder = tmp_path_factory.mktemp("sd3") / "out"
    main(parse_args(line_to(folder, **run, guidance_scale=2.0)))
    reset_accelerator()
    return folder


def with_lora(name: str, folder: Path):
    """As anybody loads it, without this package."""
    pipeline = BUILD[name]()
    pipeline.load_lora_weights(str(folder))
    return pipeline


def drawn(pipeline, prompt: str) -> torch.Tensor:
    run = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    run |= find_family(pipeline).call_arguments
    return pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **run)[0]


def test_sd3_learns_in_its_text_stream(sd3_run):
    tuned = with_lora("sd3", sd3_run)
    assert check_loaded_lora(tuned) == 5
    assert (drawn(tuned, "a white sks") - drawn(BUILD["sd3"](), "a white sks")).norm() > 1e-3
    report = json.loads((sd3_run / "training_report.json").read_text())
    assert report["arguments"]["scope"] is None
    assert {row["matrix"] for row in report["directions"]} == {
        "text", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.attn.add_k_proj",
    }  # fmt: skip
    assert len(report["predicted_drift"]) == 5
    assert not (sd3_run / "comfyui_a1111_kohya.safetensors").exists()
    statistics = FeatureStatistics.from_pretrained(sd3_run / "statistics")
    run = statistics.facts["settings"]["run"]
    assert (run["height"], run["guidance_scale"]) == (32, 2.0)


def test_a_killed_run_goes_on_to_the_same_bits(bases, teach, sd3_run):
    run = {
        "pretrained_model_name_or_path": bases / "sd3",
        "checkpointing_steps": 2,
        "lr_scheduler": "constant",
        "statistics": sd3_run / "statistics",
    }
    teach(**run, max_train_steps=2)
    resumed = teach(**run, max_train_steps=3, resume_from_checkpoint="latest", overwrite_output_dir=True)
    first, second = load_file(sd3_run / LORA), load_file(resumed / LORA)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flux_in_half_precision_with_all_its_attention(bases, teach):
    folder = teach(
        pretrained_model_name_or_path=bases / "flux",
        scope="all",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        validation_prompt="a white sks",
        num_validation_images=1,
        max_train_steps=2,
        weighting_scheme="none",
        guidance_embedding=1.0,
    )
    tuned = with_lora("flux", folder)
    assert check_loaded_lora(tuned) == 12
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / LORA).values())
    assert (drawn(tuned, "a white sks") - drawn(BUILD["flux"](), "a white sks")).norm() > 1e-3
    assert len(list((folder / "validation").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("name", "linears", "guidance"),
    [
        ("flux2", 3, 4.0),
        ("chroma", 3, 5.0),
        ("auraflow", 3, 3.5),
        ("qwen_image", 5, 4.0),
        ("z_image", 8, 5.0),
        ("wan", 6, 5.0),
    ],
)
def test_other_families_learn_in_their_text_stream(bases, teach, name, linears, guidance, caplog):
    folder = teach(
        pretrained_model_name_or_path=bases / name,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        validation_prompt="a white sks",
        num_validation_images=1,
        max_train_steps=2,
        num_inference_steps=2,
    )
    settled = json.loads((folder / "training_report.json").read_text())["arguments"]
    assert [settled[key] for key in ("learning_rate", "lr_scheduler", "guidance_scale")] == [5e-2, "cosine", guidance]
    tuned = with_lora(name, folder)
    warned = [record.message for record in caplog.records if "--gradient_checkpointing of" in record.message]
    assert len(warned) == (name == "chroma")
    assert check_loaded_lora(tuned) == linears
    assert (drawn(tuned, "a white sks") - drawn(BUILD[name](), "a white sks")).norm() > 1e-3
    assert len(list((folder / "validation").glob("*.png"))) == 1
    assert (folder / "comfyui.safetensors").exists() == (name == "wan")
    told = files_for_programs(SimpleNamespace(output_dir=folder))
    assert ("comfyui.safetensors beside it" if name == "wan" else "is for diffusers and for ComfyUI") in told
    run = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 2.0, "num_images_per_prompt": 1}
    report = evaluate_forgetting(tuned, None, [KNOWN[0]], subject_prompts=["a white sks"], **run)
    assert report.summary["subject"]["pixel_drift"] > 0
    assert report.drift_floor == 0


def test_a_lora_of_a_transformer_is_cleaned_and_reported(bases, sd3_run):
    pipeline, statistics = BUILD["sd3"](), FeatureStatistics.from_pretrained(sd3_run / "statistics")
    lora = {name: torch.randn_like(tensor) for name, tensor in load_file(sd3_run / LORA).items()}
    assert uncovered_modules(lora, statistics) == []
    cleaned = debleed_lora(lora, statistics, instance_prompts=["a white sks"], pipeline=pipeline)
    before, after = preserved_energy(lora, statistics), preserved_energy(cleaned, statistics)
    assert before.keys() == set(statistics.linears)
    assert all(after[name] < 0.5 * before[name] for name in before)
    pipeline.load_lora_weights(cleaned)
    assert check_loaded_lora(pipeline) == 5


def test_a_lora_learns_on_a_quantised_base(bases, teach, monkeypatch):
    monkeypatch.setitem(QUANTIZATIONS, "bnb_8bit", ("torch", {"load_in_8bit": True}))
    load = knowledge_of_runs.load_frozen

    def load_packed(*args, quantization_config, **kwargs):
        """As bitsandbytes would lay the weights out."""
        assert quantization_config.quant_mapping["transformer"].load_in_8bit
        pipeline = load(*args, **kwargs)
        for name, linear in list(pipeline.transformer.named_modules()):
            if type(linear) is torch.nn.Linear and linear.weight.numel() % 8 == 0:
                pipeline.transformer.set_submodule(name, Linear4bit(linear).requires_grad_(False))
        return pipeline

    monkeypatch.setattr(knowledge_of_runs, "load_frozen", load_packed)
    run = {"pretrained_model_name_or_path": bases / "sd3", "quantization": "bnb_8bit", "max_train_steps": 2}
    folder = teach(**run, mixed_precision="bf16")
    tuned = with_lora("sd3", folder)
    assert check_loaded_lora(tuned) == 5
    assert (drawn(tuned, "a white sks") - drawn(BUILD["sd3"](), "a white sks")).norm() > 1e-3
    drifts = json.loads((folder / "training_report.json").read_text())["predicted_drift"]
    assert len(drifts) == 5
    assert all(0 < drift < 1 for drift in drifts.values())


def test_what_a_quantised_base_needs(subject_line, monkeypatch):
    with pytest.raises(ValueError, match="`quantization` must have its package bitsandbytes, got 'bnb_4bit' without"):
        parse_args(subject_line(quantization="bnb_4bit"))
    monkeypatch.setitem(QUANTIZATIONS, "bnb_8bit", ("torch", {}))
    with pytest.raises(ValueError, match="`--full_finetune` must be of a base that is not quantised, got 'bnb_8bit'"):
        parse_args(subject_line(quantization="bnb_8bit", full_finetune=True))
    with pytest.raises(ValueError, match="`quantization` must be left out with a single file, got 'bnb_8bit'"):
        parse_args(subject_line(quantization="bnb_8bit", pretrained_model_name_or_path="base.safetensors"))


def test_bitsandbytes_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`quantization` must be left out where there is no GPU, got 'bnb_4bit'"):
        quantization_arguments(SimpleNamespace(quantization="bnb_4bit"), torch.bfloat16)


def test_optimizers_by_name(subject_line, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "prodigy", ("nowhere", "Prodigy"))
    with pytest.raises(ValueError, match="`optimizer` must have its package nowhere, got 'prodigy' without it"):
        parse_args(subject_line(optimizer="prodigy"))
    monkeypatch.setitem(OPTIMIZERS, "prodigy", ("torch", "optim.RAdam"))
    settings = parse_args(subject_line(optimizer="prodigy"))
    assert settings.learning_rate == 1.0
    weights = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = make_optimizer(settings, weights)
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.RAdam, 1.0)
    assert type(make_optimizer(parse_args(subject_line()), weights)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sd3", {"features": "q"}, "`features` must be left out for a joint-attention model"),
        ("sd3", {"cross_attention_layers": 0}, "`layers` must be left out for a joint-attention model"),
        ("sd3", {"snr_gamma": 5.0}, "`snr_gamma` must be left out for the flow-matching SD3Transformer2DModel"),
        ("sd3", {"guidance_embedding": 2.0}, "`guidance_embedding` must be left out for a SD3Transformer2DModel"),
        ("flux", {"resolution": 40}, "`resolution` must be a multiple of 16 for this model, got 40"),
        ("digits", {"scope": "all"}, "`scope` must be left out for a UNet2DConditionModel, got 'all'"),
        ("digits", {"weighting_scheme": "none"}, "`weighting_scheme` must be left out for Stable Diffusion"),
    ],
)
def test_what_a_model_does_not_have_is_refused(subject_line, name, arguments, message):
    pipeline = BUILD[name]() if name in BUILD else random_digits_pipeline()
    if name == "flux":
        pipeline.vae_scale_factor = 8  # as that of the published model
    with pytest.raises(ValueError, match=message):
        check_against_model(parse_args(subject_line(**arguments)), pipeline)

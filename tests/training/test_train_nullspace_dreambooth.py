from __future__ import annotations

import json

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_ext.nullspace.collect import encode_text
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.run import main, parse_args
from examples.digits.check_model import load_pipeline
from tests.tiny_pipelines import sdxl_pipeline
from tests.training.conftest import KNOWN
from tests.training.script_runs import files_below

LORA = "pytorch_lora_weights.safetensors"
SUBJECT = "a white sks"


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return load_pipeline()


def latents(pipeline, prompt: str) -> torch.Tensor:
    return pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def drift(base, tuned, prompt: str) -> float:
    """Relative change of what is drawn."""
    before, after = latents(base, prompt), latents(tuned, prompt)
    return ((after - before).norm() / before.norm()).item()


def with_lora(folder) -> StableDiffusionPipeline:
    """As anybody loads it, without this package."""
    pipeline = load_pipeline()
    pipeline.load_lora_weights(str(folder))
    return pipeline


def read_report(folder) -> dict:
    return json.loads((folder / "training_report.json").read_text())


def lora_tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA)


def same_lora(first, second) -> bool:
    return (first / LORA).read_bytes() == (second / LORA).read_bytes()


@pytest.mark.parametrize("directions", ["generalized", "null", "soft", "plain"])
def test_every_kind_of_directions_gives_an_ordinary_lora(teach, base, directions):
    folder = teach(directions=directions, max_train_steps=6, logging_steps=2)
    assert drift(base, with_lora(folder), SUBJECT) > 1e-3
    weights = lora_tensors(folder)
    assert len(weights) == 2 * 14
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    downs = [tensor for name, tensor in weights.items() if "lora_A" in name]
    frozen = directions in ("generalized", "null")
    assert all(torch.equal(down, downs[0]) for down in downs) == frozen
    report = read_report(folder)
    assert [row["step"] for row in report["history"]] == [2, 4, 6]
    assert report["arguments"]["directions"] == directions
    assert report["seconds"] > 0
    assert ("preservation" in report["history"][0]) == (directions == "soft")
    assert bool(report["directions"]) == frozen
    if directions == "plain":
        kohya = "comfyui_a1111_kohya.safetensors"
        assert files_below(folder) == {LORA, kohya, "training_report.json"}
    else:
        assert set(KNOWN) == set(FeatureStatistics.from_pretrained(folder / "statistics").facts["prompts"])
        assert len(report["predicted_drift"]) == 14
        assert report["statistics"][0]["dim"] == 128


def test_an_exact_null_space_keeps_preserved_prompts(teach, base):
    cut = {"null_energy": 0, "no_sub_phrases": True}
    exact = teach("exact", directions="null", **cut, rank=4, max_train_steps=10)
    free = teach("free", directions="plain", rank=4, learning_rate=3e-2, max_train_steps=10)
    assert drift(base, with_lora(exact), SUBJECT) > 1e-2
    assert drift(base, with_lora(exact), KNOWN[0]) < 1e-5
    assert drift(base, with_lora(free), KNOWN[0]) > 1e-2


def test_full_weights_change_only_in_the_null_space(teach, base):
    cut = {"null_energy": 0, "no_sub_phrases": True}
    folder = teach(full_finetune=True, **cut, learning_rate=1e-3, max_train_steps=10)
    tuned = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    tuned.set_progress_bar_config(disable=True)
    known = encode_text(base, ["", *KNOWN]).reshape(-1, 128)
    before = dict(base.unet.named_parameters())
    for name, after in tuned.unet.named_parameters():
        delta = after - before[name]
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            assert delta.norm() > 1e-4
            assert (delta @ known.T).norm() < 1e-5 * (before[name] @ known.T).norm()
        else:
            assert not delta.any(), name
    for kept in ("text_encoder", "vae"):
        for old, new in zip(getattr(base, kept).parameters(), getattr(tuned, kept).parameters()):
            assert torch.equal(old, new)
    assert drift(base, tuned, SUBJECT) > 1e-3
    assert drift(base, tuned, KNOWN[1]) < 1e-5
    assert not (folder / LORA).exists()
    assert (folder / "statistics").is_dir()


def test_saved_statistics_stand_for_the_prompts(teach):
    collected = teach("collected")
    reused = teach("reused", statistics=collected / "statistics")
    assert same_lora(collected, reused)
    assert read_report(reused)["statistics"] == read_report(collected)["statistics"]


def test_other_subjects_are_preserved_too(teach):
    other = {"other_instance_prompts": "a white ohwx"}
    alone = teach("alone")
    together = teach("together", **other)
    merged = teach("merged", statistics=alone / "statistics", **other)
    for folder in (together, merged):
        statistics = FeatureStatistics.from_pretrained(folder / "statistics")
        assert statistics.facts["prompts"] == [*KNOWN, "a white ohwx"]
        assert not same_lora(alone, folder)
    assert same_lora(together, merged)
    first, second = (read_report(f)["statistics"][0]["vectors"] for f in (alone, together))
    assert first < second


def test_a_yaml_file_gives_the_same_run(teach, tmp_path, pictures, knowledge, fresh_accelerator):
    flags = teach("flags", directions="null", rank=2, nullspace_threshold=2e-2)
    config = tmp_path / "run.yaml"
    values = {
        "pretrained_model_name_or_path": read_report(flags)["arguments"]["pretrained_model_name_or_path"],
        "output_dir": str(tmp_path / "yaml"),
        "instance_data_dir": str(pictures),
        "instance_prompt": SUBJECT,
        "resolution": 32,
        "max_train_steps": 4,
        "train_batch_size": 1,
        "rank": 2,
        "directions": "null",
        "nullbooth": {
            "enable": True,
            "original_knowledge_prompts": str(knowledge),
            "nullspace_threshold": "2e-2",
            "num_denoising_steps": 3,
            "collect_features": {"k_features": True, "v_features": True, "q_features": False},
            "cross_attention_layers": "all",
            "visual_attention_map": False,
        },
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    folder = main(parse_args(["--config", str(config), "--train_batch_size", "2"]))
    assert same_lora(flags, folder)
    values["nullbooth"]["enable"] = False
    config.write_text(yaml.safe_dump(values))
    assert parse_args(["--config", str(config)]).directions == "plain"


def test_sdxl(tmp_path, teach, base):
    pipeline = sdxl_pipeline()
    pipeline.save_pretrained(tmp_path / "sdxl")
    folder = teach(
        pretrained_model_name_or_path=tmp_path / "sdxl",
        max_train_steps=2,
        learning_rate=1.0,
        validation_prompt=SUBJECT,
        num_validation_images=2,
    )
    before = latents(pipeline, SUBJECT)
    pipeline.load_lora_weights(str(folder))
    assert not torch.equal(before, latents(pipeline, SUBJECT))
    assert (folder / "validation" / "step-000002-prompt-0.png").is_file()

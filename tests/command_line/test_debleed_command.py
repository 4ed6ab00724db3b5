from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from diffusers_ext.command_line.debleed import debleed_verdict
from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.nullspace.debleed import debleed_lora, preserved_energy
from diffusers_ext.nullspace.interference import interference_report
from diffusers_ext.nullspace.statistics import FeatureStatistics


@pytest.fixture
def debleed(run, lora, statistics, tmp_path):
    """Run `debleed`."""

    def call(*words, **flags):
        usual = {"statistics": statistics, "output_path": tmp_path / "quiet.safetensors"}
        return run("debleed", *(words or (lora,)), overwrite_output_dir=True, **{**usual, **flags})

    return call


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def test_the_file_is_that_of_the_library(debleed, lora, statistics, tmp_path):
    ran = debleed(json=True)
    assert ran.code == 0
    known = FeatureStatistics.from_pretrained(statistics)
    expected = debleed_lora(lora, known, damping=1e-3)
    assert same(load_file(tmp_path / "quiet.safetensors"), expected)
    facts = ran.facts
    assert facts["criterion"] == {"damping": 1e-3}
    assert facts["modules"] == facts["covered_modules"] == 14
    energies = [preserved_energy(tensors, known) for tensors in (lora, expected)]
    left = sum(energies[1].values()) / sum(energies[0].values())
    assert facts["drift_left"] == pytest.approx(left)
    assert 0 < facts["drift_left"] < 1e-2
    assert max(facts["drift_left_by_module"].values()) >= facts["drift_left"]


def test_the_subject_is_kept(debleed, lora, statistics, digits, tmp_path):
    prompts = ["a photo of the digit sks"]
    model = {"pretrained_model_name_or_path": digits, "device": "cpu"}
    ran = debleed(instance_prompt=prompts[0], strictness=3, json=True, **model)
    assert ran.code == 0
    assert ran.facts["criterion"] == {"strictness": 3.0}
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    known = FeatureStatistics.from_pretrained(statistics)
    expected = debleed_lora(lora, known, pipeline=pipeline, instance_prompts=prompts, strictness=3.0)
    assert same(load_file(tmp_path / "quiet.safetensors"), expected)
    ran = debleed(instance_prompt=prompts[0], damping=1.0, **model)
    assert ran.code == 1
    assert "`--damping` must not be given with `--instance_prompt`" in ran.err
    assert "`--instance_prompt` must be given with `--strictness`" in debleed(strictness=3).err


def test_interference_of_loras_is_that_of_the_library(run, lora, statistics, digits, tmp_path):
    tensors, prompts = read_lora(lora), ["a photo of sks", "the number nine"]
    save_file({key: value / 2 for key, value in tensors.items()}, tmp_path / "half.safetensors")
    save_file(tensors, tmp_path / "dog.safetensors", {"modelspec.trigger_phrase": prompts[0]})
    files = [tmp_path / "dog.safetensors", tmp_path / "half.safetensors"]
    model = {"statistics": statistics, "pretrained_model_name_or_path": digits, "device": "cpu"}
    asked = ["--instance_prompt", prompts[0], "--instance_prompt", prompts[1]]
    ran = run("interference", *files, *asked, json=True, weights=[1, 4], **model)
    assert ran.code == 0
    expected = interference_report(
        StableDiffusionPipeline.from_pretrained(digits),
        dict(zip(("dog", "half"), files)),
        FeatureStatistics.from_pretrained(statistics),
        {"dog": prompts[:1], "half": prompts[1:]},
        weights={"half": 4.0},
    )
    assert ran.facts["moved"] == expected.moved
    assert ran.facts["pairs"] == expected.pairs
    assert expected.pairs[0]["shares"] == pytest.approx({"dog": 1, "half": 1})
    said = run("interference", *files, *asked, weights=[1, 4], **model).out
    assert said.startswith(expected.to_table())
    assert "Not covered" not in said
    assert "`--instance_prompt` must be given, got none, and" in run("interference", *files, **model).err
    assert "must be given for each of 2 LoRAs, got 1" in run("interference", *files, *asked[:2], **model).err
    assert "must have names of their own" in run("interference", files[0], files[0], *asked, **model).err


def test_text_encoders_are_projected_and_listed_on_request(debleed, lora, digits, tmp_path):
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    sizes = {"A": (2, 128), "B": (128, 2)}
    tensors = {f"{module}.lora_{part}.weight": torch.ones(size) / 8 for part, size in sizes.items()}
    save_file({**read_lora(lora), **tensors}, tmp_path / "both.safetensors")
    model = {"pretrained_model_name_or_path": digits, "device": "cpu"}
    assert "got none for 1, the first is 'text_encoder" in debleed(tmp_path / "both.safetensors", **model).err
    ran = debleed(tmp_path / "both.safetensors", text_encoders=True, json=True, **model)
    assert (ran.facts["modules"], ran.facts["covered_modules"], ran.facts["uncovered_modules"]) == (15, 15, [])
    drifts = ran.facts["predicted_drift"]
    assert len(drifts) == 15
    assert 0 <= drifts[module][1] < drifts[module][0] / 10
    written = load_file(tmp_path / "quiet.safetensors")
    assert not written[f"{module}.lora_A.weight"].equal(tensors[f"{module}.lora_A.weight"])
    said = debleed(tmp_path / "both.safetensors", text_encoders=True, **model).out
    assert f"  {module}: {drifts[module][0]:.3g} -> {drifts[module][1]:.3g}" in said
    assert "The LoRA changes no text encoder." in debleed(text_encoders=True, **model).out


def test_what_is_said_and_another_criterion(debleed, lora, tmp_path):
    ran = debleed(lora / "pytorch_lora_weights.safetensors", energy=0, format="kohya")
    assert ran.code == 0
    assert "The predicted drift on preserved prompts fell to " in ran.out
    assert "over 14 modules; the worst of them, " in ran.out
    assert f"Wrote {tmp_path / 'quiet.safetensors'}" in ran.out
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "quiet.safetensors"))


def test_modules_without_a_statistic(debleed, lora, tmp_path):
    tensors = read_lora(lora)
    some = next(key for key in tensors if key.endswith("lora_A.weight"))
    other = some.replace("attn2.to_k", "attn2.to_q").replace("attn2.to_v", "attn2.to_q")
    tensors[other] = tensors[some].clone()
    tensors[other.replace("lora_A", "lora_B")] = tensors[some.replace("lora_A", "lora_B")].clone()
    save_file(tensors, tmp_path / "more.safetensors")
    ran = debleed(tmp_path / "more.safetensors")
    assert ran.code == 1
    assert "`--statistics` must cover every module of the LoRA, got none for 1" in ran.err
    assert not (tmp_path / "quiet.safetensors").exists()
    facts = debleed(tmp_path / "more.safetensors", uncovered="keep", json=True).facts
    assert (facts["modules"], facts["covered_modules"]) == (15, 14)
    assert load_file(tmp_path / "quiet.safetensors")[other].equal(tensors[other])


def test_a_lora_of_which_nothing_is_covered(debleed, lora, tmp_path):
    tensors = {
        key.replace("attn2.to_k", "attn2.to_q"): tensor.clone()
        for key, tensor in read_lora(lora).items()
        if "attn2.to_k" in key
    }
    save_file(tensors, tmp_path / "queries.safetensors")
    ran = debleed(tmp_path / "queries.safetensors", uncovered="keep", json=True)
    assert (ran.facts["covered_modules"], ran.facts["drift_left"]) == (0, None)
    ran = debleed(tmp_path / "queries.safetensors", uncovered="keep")
    assert "Nothing was projected: the statistics cover no module of the LoRA." in ran.out
    assert "7 modules without a statistic were kept as they were and not measured (7 in unet)" in ran.out


def test_the_verdict_names_what_it_covers():
    alone = debleed_verdict(2, {}, None, [], "error")
    assert alone.startswith("The LoRA does not act on what is preserved")
    others = ["unet.attn1.to_q", "text_encoder.text_model.encoder.layers.0.q_proj"]
    for share, left in ((None, {}), (0.5, {"a": 0.5})):
        told = debleed_verdict(2, left, share, others, "keep")
        assert "The LoRA does not act" not in told
        assert "2 modules without a statistic were kept" in told
        assert "(1 in text_encoder, 1 in unet)" in told
        assert "also changes what the projected modules read" in told
    assert "were removed: 1 in unet." in debleed_verdict(2, {}, None, others[:1], "drop")


def test_both_drifts_are_measured_by_drawing(debleed, digits):
    model = {"pretrained_model_name_or_path": digits, "device": "cpu"}
    ran = debleed(measure=2, num_inference_steps=2, json=True, **model)
    assert ran.code == 0
    measured = ran.facts["measured_drift"]
    assert measured["prompts"] == 2
    assert measured["floor"] <= measured["after"] < measured["before"]
    assert "must be at least 1" in debleed(measure=0, **model).err


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["nowhere.safetensors"], {}, "nowhere.safetensors"),
        (["a b/c"], {}, "A LoRA must be a file, a folder or 'user/name', got a b/c"),
        ([], {"statistics": "./nowhere"}, "no such folder"),
        ([], {"output_path": "quiet.bin"}, "`--output_path` must end in .safetensors"),
        ([], {"damping": 0}, "`--damping` must be positive, got 0.0."),
        ([], {"rank": 1000}, "`--rank` must be from 1 to the width"),
        ([], {"weight_name": "other.safetensors"}, "must hold other.safetensors, got none"),
    ],
)
def test_bad_input_is_refused(debleed, hub, tmp_path, words, flags, message):
    ran = debleed(*words, **flags)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not list(tmp_path.iterdir())


def test_everything_by_its_name_on_the_hub(debleed, hub, lora, statistics, tmp_path):
    for folder, name in ((lora, "tester/lora"), (statistics, "tester/statistics")):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    assert debleed(json=True).code == 0
    local = load_file(tmp_path / "quiet.safetensors")
    ran = debleed("tester/lora", statistics="tester/statistics")
    assert ran.code == 0
    assert same(load_file(tmp_path / "quiet.safetensors"), local)
    missing = debleed("tester/statistics")
    assert "Repository tester/statistics must hold pytorch_lora_weights.safetensors" in missing.err

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext import (
    FeatureStatistics,
    GoldenNoisePipeline,
    NullSpaceDreamBoothPipeline,
    collect_statistics,
    load_eraser,
    load_noise_model,
    open_pairs,
    push_artifact,
    save_eraser,
)
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.families.lora_files import check_loaded_lora
from diffusers_ext.hub import Measured
from diffusers_ext.sharing import measured_results
from tests.eraser.saved_erasers import make_eraser
from tests.golden_noise.golden_pipelines import random_network
from tests.golden_noise.pair_sets import write_set
from tests.nullspace.test_pipeline import lora
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_digits import random_digits_pipeline

FACTS = {"base_model": "user/base", "license": "mit", "trained_on": "A few things."}
CLASS = "StableDiffusionPipeline"


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


@pytest.fixture(scope="module")
def statistics(pipeline) -> FeatureStatistics:
    return collect_statistics(pipeline, ["a red one"], expand_sub_phrases=False)


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def clutter(folder: Path) -> None:
    """What else lies about in the folder of a training."""
    for name in ("checkpoint-2/state.bin", "logs/run", "diary.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def write_report(folder: Path, **card) -> None:
    Image.new("RGB", (4, 4)).save(folder / "shown.png")
    facts = {**FACTS, "settings": {"seed": 0}, "widget": [["a red one", "shown.png"]], **card}
    (folder / "training_report.json").write_text(json.dumps({"card": facts}))


def test_a_lora_of_a_training(hub, statistics, pipeline, tmp_path):
    save_file(lora(), tmp_path / LORA_WEIGHT_NAME)
    statistics.save_pretrained(tmp_path / "statistics")
    clutter(tmp_path)
    write_report(tmp_path, instance_prompt="a sks", pipeline=CLASS, directions="null")
    report = json.loads((tmp_path / "training_report.json").read_text())
    report["predicted_drift"] = {"a": 0.5, "b": 0.25}
    (tmp_path / "training_report.json").write_text(json.dumps(report))
    push_artifact(tmp_path, "lora", private=True)
    files = hub.files("tester/lora")
    assert sorted(files) == [
        "README.md", "comfyui_a1111_kohya.safetensors", "pictures/0.png", LORA_WEIGHT_NAME,
        "statistics/config.json",
        "statistics/model.safetensors",
    ]  # fmt: skip
    card = card_of(hub, "tester/lora")
    assert card.data.instance_prompt == "a sks"
    assert card.data.eval_results[0].metric_value == 0.375
    assert hub.repos["tester/lora"].private
    pipeline.load_lora_weights("tester/lora")
    assert check_loaded_lora(pipeline)
    pipeline.unload_lora_weights()


def test_a_file_of_a_lora_needs_its_facts(hub, tmp_path):
    save_file(lora(), tmp_path / "mine.safetensors")
    facts = {**FACTS, "instance_prompt": "a sks", "pipeline": CLASS}
    with pytest.raises(ValueError, match="`directions` must be given for the card, got None"):
        push_artifact(tmp_path / "mine.safetensors", "lora", **facts)
    measured = Measured("12 prompts", "drift", 0.125)
    push_artifact(tmp_path / "mine.safetensors", "lora", **facts, directions="plain", results=[measured])
    assert card_of(hub, "tester/lora").data.eval_results[0].metric_value == 0.125


@pytest.mark.parametrize("format", ["peft", "legacy"])
def test_an_eraser(hub, tmp_path, format):
    save_eraser(make_eraser(tiny_transformer(), concept="seven"), tmp_path, format=format)
    clutter(tmp_path)
    write_report(tmp_path, preserved_concepts=["two"])
    concept = {"concept": "seven"} if format == "legacy" else {}
    push_artifact(tmp_path, "eraser", license="apache-2.0", subfolder="one", **concept)
    files = hub.files("tester/eraser")
    assert len(files) == 5
    assert {"README.md", "one/shown.png", "one/training_report.json"} < files.keys()
    card = card_of(hub, "tester/eraser")
    assert card.data.license == "apache-2.0"  # what is given goes before the report
    assert card.data.widget[0]["output"]["url"] == "one/shown.png"
    load_eraser(tiny_transformer(), "tester/eraser", subfolder="one")
    other = {"peft": "legacy", "legacy": "peft"}[format]
    arguments = {**FACTS, "preserved_concepts": [], "subfolder": "one"}
    eraser = make_eraser(tiny_transformer(), concept="seven")
    save_eraser(eraser, tmp_path / "new", format=other, push_to_hub=True, repo_id="eraser", **arguments)
    in_place = hub.files("tester/eraser")  # the other format would be read first, or never
    assert len(in_place) == len(files)
    assert {f"one/{path.name}" for path in (tmp_path / "new").iterdir()} < in_place.keys()


def test_statistics(hub, statistics, tmp_path):
    statistics.save_pretrained(tmp_path)
    clutter(tmp_path)
    push_artifact(tmp_path, "statistics", base_model="user/base", license="mit")
    assert len(hub.files("tester/statistics")) == 3
    assert FeatureStatistics.from_pretrained("tester/statistics").facts == statistics.facts


def test_a_network(hub, pipeline, tmp_path):
    network = random_network(GoldenNoisePipeline.from_pipe(pipeline), "model")
    network.half().save_pretrained(tmp_path)
    clutter(tmp_path)
    push_artifact(tmp_path, "network", **FACTS, pipeline=CLASS)
    files = hub.files("tester/network")
    weights = "diffusion_pytorch_model.safetensors"
    assert sorted(files) == ["README.md", "config.json", weights]
    assert files[weights] == (tmp_path / weights).read_bytes()
    assert type(load_noise_model("tester/network")) is type(network)


def test_pairs(hub, tmp_path):
    write_set(tmp_path / "set")
    facts = {**FACTS, "pipeline": CLASS, "reward": ""}
    push_artifact(tmp_path / "set", "pairs", **facts)
    assert len(open_pairs("tester/pairs")) == len(open_pairs(tmp_path / "set"))


def test_pipelines(hub, pipeline, statistics, tmp_path):
    own = NullSpaceDreamBoothPipeline.from_pipe(pipeline, statistics=statistics)
    own.save_pretrained(tmp_path / "null")
    clutter(tmp_path / "null")
    push_artifact(tmp_path / "null", "null", **FACTS, instance_prompt="a sks")
    assert not {"diary.txt", "logs/run"} & hub.files("tester/null").keys()
    loaded = NullSpaceDreamBoothPipeline.from_pretrained("tester/null", dtype=torch.float32)
    assert loaded.statistics.facts == statistics.facts
    pipeline.save_pretrained(tmp_path / "full" / "pipeline")
    statistics.save_pretrained(tmp_path / "full" / "statistics")
    write_report(tmp_path / "full", instance_prompt="a sks")
    push_artifact(tmp_path / "full", "full")
    files = hub.files("tester/full")
    assert {"model_index.json", "statistics/config.json", "shown.png"} < files.keys()
    assert not [name for name in files if name.startswith("pipeline/")]
    network = random_network(GoldenNoisePipeline.from_pipe(pipeline), "model")
    golden = GoldenNoisePipeline.from_pipe(pipeline, noise_model=network)
    golden.save_pretrained(tmp_path / "golden")
    push_artifact(tmp_path / "golden", "golden", **FACTS)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"{count:,}" in card_of(hub, "tester/golden").text


def test_nothing_unknown_is_uploaded(hub, tmp_path):
    def push(source: Path, match: str, **facts) -> None:
        with pytest.raises(ValueError, match=match):
            push_artifact(source, "repo", **{**FACTS, **facts})

    push(tmp_path / "absent", "`source` must be a folder or a file, got .*absent: there is none")
    (tmp_path / "notes.txt").write_text("words")
    push(tmp_path, "`source` must hold .* got .'notes.txt'")
    push(tmp_path / "notes.txt", "`source` must hold")
    (tmp_path / "config.json").write_text("{")
    push(tmp_path, "config.json must hold JSON")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    push(tmp_path, "got a PixArtAlphaPipeline in")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": CLASS}))
    push(tmp_path, "`instance_prompt` must be given for the card")
    push(tmp_path, "`results` must be the report of an evaluation", results=tmp_path / "absent")
    assert not hub.repos


def test_figures_of_a_forgetting_report(tmp_path):
    figures = {"prompts": 3, "images": 12, "pixel_drift": 0.25, "clip_score_tuned": 0.5}
    report = ForgettingReport({}, 0.0, [], {"held_out": figures})
    report.to_json(tmp_path / "report.json")
    found = measured_results(tmp_path)
    assert [(r.dataset, r.metric, r.value) for r in found] == [
        ("held out prompts", "pixel drift", 0.25), ("held out prompts", "clip score tuned", 0.5),
    ]  # fmt: skip
    assert found[0].notes == "3 prompts, 12 pictures"


def test_figures_of_a_golden_noise_report(tmp_path):
    compared = {
        "pairs": 8, "difference": 0.125, "difference_interval": [0.0, 0.25], "win_rate": 0.75,
        "win_rate_interval": [0.5, 1.0],
    }  # fmt: skip
    report = GoldenNoiseReport({}, {"golden": {"hps": compared}}, {}, {}, {}, {}, [])
    report.to_json(tmp_path / "golden.json")
    difference, wins = measured_results(tmp_path / "golden.json")
    assert (difference.metric, difference.value) == (
        "hps, difference of golden to standard noise", 0.125,
    )  # fmt: skip
    assert (wins.value, wins.notes) == (0.75, "95 % interval 0.5 to 1")


def test_figures_of_an_erasure_report(tmp_path):
    seen = {"pairs": 8, "base": 0.875, "other": 0.125, "other_interval": [0.0, 0.5]}
    rates = {"erased": {"seven": seen, "never judged": {"pairs": 0}}}
    ErasureReport({}, {"target": {"rates": rates}}, []).to_json(tmp_path / "report.json")
    (found,) = measured_results(tmp_path)
    assert (found.dataset, found.value) == ("target prompts", 0.125)
    assert found.metric == "share of clips that show seven, erased"
    assert found.notes == "0.875 without the eraser; 8 clips; 95 % interval 0 to 0.5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`results` must be the report of an evaluation, got .*report.json: no such file"),
        ("{", "report.json must hold JSON"),
        (json.dumps({"loss": 1}), "must be the report of an evaluation, got ..loss"),
        ("[]", "report.json must hold a JSON object, got a list"),
    ],
)
def test_other_reports_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        measured_results(tmp_path)

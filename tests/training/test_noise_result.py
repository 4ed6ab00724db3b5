from __future__ import annotations

import types

import pytest
import yaml

from tests.training.noise_runs import read_report, train
from tests.training.noise_sets import digits_facts, write_noises
from training import publish
from training.noise_result import PIPELINES, network_card
from training.train_npnet import parse_args


REPORT = {
    "network": "GoldenNoiseModel",
    "parameters": 1234567,
    "pipeline_class": "StableDiffusionXLPipeline",
    "data": {
        "generation": {"w1": 5.5, "redenoise_steps": 10, "models": {}, "reward": None},
        "training_samples": 900,
        "latent_shape": [4, 128, 128],
        "steps": [1],
    },
    "validation": [{"step": 100, "validation_relative": 0.25, "validation_cosine": 0.9}],
}


def make_args(**values):
    line = ["--base_model_id", "somebody/base", "--dataset_dir", "d", "--output_dir", "out"]
    args = parse_args([*line, "--max_train_steps", "100", "--hub_token", "secret"])
    vars(args).update(values)
    return args


def test_the_card_tells_what_it_is_how_it_loads_and_where_it_ends():
    card = network_card(make_args(use_ema=True), "me/noise", REPORT)
    header = yaml.safe_load(str(card).split("---")[1])
    assert header["base_model"] == "somebody/base"
    assert header["license"] == "other"
    assert "golden-noise" in header["tags"]
    for text in (
        "`GoldenNoiseModel` of 1,234,567 parameters",
        'GoldenNoiseModel.from_pretrained("me/noise")',
        'GoldenNoiseXLPipeline.from_pretrained("somebody/base", noise_model=noise_model)',
        "100 steps on 900 samples with latents of\n4 x 128 x 128",
        "averaged weights",
        "| w1 | 5.5 |\n| redenoise_steps | 10 |",
        "| validation_relative | 0.2500 |\n| validation_cosine | 0.9000 |",
        "Any picture size works",
        "licence of the base model",
    ):
        assert text in card.text
    for left_over in ("{{", "{%", "None", "secret"):
        assert left_over not in str(card)


def test_the_card_names_the_reward_and_no_path_of_this_machine(tmp_path):
    base = tmp_path / "my-base"
    base.mkdir()
    generation = {
        "pretrained_model_name_or_path": str(base),
        "negative_prompt": "",
        "reward": {"name": "hpsv2", "version": "v2.1"},
    }
    report = {**REPORT, "data": {**REPORT["data"], "generation": generation}}
    card = network_card(make_args(pretrained_model_name_or_path=str(base)), "me/noise", report)
    assert "| reward | hpsv2, v2.1 |" in card.text
    assert "# Golden noise for my-base" in card.text
    assert "| pretrained_model_name_or_path | my-base |" in card.text
    assert "negative_prompt" not in card.text
    assert str(tmp_path) not in str(card)


def test_the_card_of_npnet_on_foreign_pairs():
    report = {**REPORT, "network": "NPNet", "validation": []}
    report["data"] = {**REPORT["data"], "generation": None}
    text = network_card(make_args(), "me/noise", report).text
    assert "Made for latents of 4 x 128 x 128" in text
    assert "## Figures" not in text
    assert "made with" not in text
    assert "averaged weights" not in text


def test_every_pipeline_has_its_golden_twin():
    assert len(set(PIPELINES.values())) == 5


@pytest.fixture
def hub(monkeypatch) -> list:
    calls = []

    class Api:
        def __init__(self, token=None) -> None:
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append(("create", name))
            return types.SimpleNamespace(repo_id=f"somebody/{name}")

        def upload_folder(self, **options):
            calls.append(("upload", options))
            return "https://huggingface.co/commit"

    monkeypatch.setattr(publish, "HfApi", Api)
    return calls


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_is_published_at_its_end(hub, tmp_path):
    pairs = write_noises(tmp_path / "pairs", facts=digits_facts())
    folder = train(
        "golden_noise_model", pairs, tmp_path / "out", push_to_hub=True, hub_token="secret",
        hub_model_id="noise", checkpointing_steps=2,
    )  # fmt: skip
    uploads = [options for kind, options in hub if kind == "upload"]
    assert ("token", "secret") in hub
    assert uploads[0]["repo_id"] == "somebody/noise"
    assert "checkpoint-*" in uploads[0]["ignore_patterns"]
    card = (folder / "README.md").read_text()
    assert 'GoldenNoiseModel.from_pretrained("somebody/noise")' in card
    assert "validation_relative" in card
    assert "hub_token" not in read_report(folder)["arguments"]
    assert "secret" not in card + (folder / "training_report.json").read_text()

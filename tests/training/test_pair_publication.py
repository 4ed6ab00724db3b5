from __future__ import annotations

import json

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from huggingface_hub.errors import BadRequestError

from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from tests.training.noise_runs import read_report, train


def test_generated_pairs_are_shared_and_trained_on_by_name(generate, hub, tmp_path):
    options = {"push_to_hub": True, "hub_license": "mit", "hub_model_id": "tester/pairs"}
    folder = generate(**options)
    pairs, shared = open_pairs(folder), open_pairs("tester/pairs")
    assert shared.records == pairs.records
    table = load_dataset("tester/pairs", "pairs", split="train", cache_dir=str(tmp_path / "tables"))
    assert table["prompt"] == pairs.prompts
    card = DatasetCard(hub.files("tester/pairs", "dataset")["README.md"].decode())
    win_rate = json.loads((folder / "report.json").read_text())["win_rate"]
    for text in ("one random noise for each of 5 prompts", "brightness 1", f"{win_rate:.4g}"):
        assert text in card.text
    assert card.data.license == "mit"
    trained = train("golden_noise_model", "tester/pairs", tmp_path / "out", validation_split=0)
    assert read_report(trained)["data"]["samples"] == len(pairs)
    with pytest.raises(ValueError, match="`revision` must be a branch, .* tester/pairs, got 'v9'"):
        train("npnet", "tester/pairs", tmp_path / "other", dataset_revision="v9")


def test_a_stopped_upload_goes_on_without_making_the_pairs_again(generate, hub):
    options = {"push_to_hub": True, "hub_license": "mit", "no_filter": True, "reward": None}
    hub.fail_next("POST", "/commit/", how="400")
    with pytest.raises(BadRequestError, match="Broken for a test"):
        generate(**options)
    assert "config.json" not in hub.files("tester/set", "dataset")
    folder = generate(resume_from_checkpoint="latest", **options)
    assert json.loads((folder / "report.json").read_text())["this_run"]["tried"] == 0
    assert open_pairs("tester/set").records == open_pairs(folder).records


def test_what_the_card_lacks_stops_the_run_before_it_begins(generate, hub, tmp_path):
    with pytest.raises(ValueError, match=r"`license` must be given.* The flag is `--hub_license`"):
        generate(push_to_hub=True)
    assert not (tmp_path / "set").exists()
    assert not hub.repos

from __future__ import annotations

import json

import pytest
import torch

from diffusers_ext.core.capture import natural_key
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.command_line.conftest import PROMPTS
from tests.tiny_digits import random_digits_pipeline


@pytest.fixture
def collect(run, digits, prompts, tmp_path):
    """Run `collect`."""

    def call(**flags):
        usual = {"pretrained_model_name_or_path": digits, "knowledge_prompts": prompts,
                 "output_dir": tmp_path / "out", "device": "cpu"}  # fmt: skip
        return run("collect", **{**usual, **flags})

    return call


def test_the_folder_is_that_of_the_library(collect, tmp_path):
    ran = collect(json=True)
    assert ran.code == 0
    found = FeatureStatistics.from_pretrained(tmp_path / "out")
    expected = collect_statistics(random_digits_pipeline(), PROMPTS, show_progress=False)
    assert found.moments["text"].mean.equal(expected.moments["text"].mean)
    assert ran.facts["output_dir"] == str(tmp_path / "out")
    assert (ran.facts["prompts"], ran.facts["linears"]) == (2, 14)
    assert ran.facts["matrices"] == found.report()
    assert ran.facts["seconds"] > 0


def test_options_reach_the_collection(collect, tmp_path):
    ran = collect(
        features=["q", "attn1.q"],
        cross_attention_layers=[0, 2],
        num_inference_steps=2,
        guidance_scale=3,
        statistics_batch_size=1,
        negative_prompt="blurry",
        progress_dir=tmp_path / "progress",
        compress=0.9,
        store_spectra=True,
        export_layout=tmp_path / "layout",
        quiet=True,
    )
    assert ran.code == 0
    assert ran.err == ""
    found = FeatureStatistics.from_pretrained(tmp_path / "out")
    settings = found.facts["settings"]
    assert (settings["features"], settings["layers"]) == (["q", "attn1.q"], [0, 2])
    assert settings["run"]["num_inference_steps"] == 2
    assert (settings["batch_size"], settings["negative_prompt"]) == (1, "blurry")
    assert found.facts["compressed_energy"] == 0.9
    assert json.loads((tmp_path / "out/config.json").read_text())["spectra"] == sorted(found.moments, key=natural_key)
    assert list((tmp_path / "progress").rglob("batches-*"))
    assert list((tmp_path / "layout").rglob("q_covariance.npy"))
    assert "99.9 % of the energy in" in ran.out
    assert f"Wrote {tmp_path / 'out'}" in ran.out


@pytest.mark.parametrize("parts", [True, False])
def test_other_subjects_weigh_without_their_parts_as_much_as_the_knowledge(collect, tmp_path, parts):
    flags = {} if parts else {"no_sub_phrases": True}
    assert collect(other_instance_prompts="a white sks", **flags).code == 0
    found = FeatureStatistics.from_pretrained(tmp_path / "out")
    base = random_digits_pipeline()
    expected = collect_statistics(base, PROMPTS, expand_sub_phrases=parts)
    expected.merge(collect_statistics(base, ["a white sks"], expand_sub_phrases=False), times=2)
    assert found.moments["text"].mean.equal(expected.moments["text"].mean)


def test_jobs_write_parts_that_are_put_together(collect, run, tmp_path, monkeypatch):
    collect(other_instance_prompts="a white sks")
    parts = [tmp_path / f"part_{index}" for index in range(2)]
    for index, folder in enumerate(parts):
        monkeypatch.setenv("PMI_RANK", str(index))  # as an array of jobs may have it
        ran = collect(other_instance_prompts="a white sks", shard=f"{index}/2", output_dir=folder, json=True)
        assert (ran.code, ran.facts["part"]) == (0, [index, 2])
    monkeypatch.delenv("PMI_RANK")
    ran = run("merge", *parts, output_dir=tmp_path / "merged", store_spectra=True, json=True)
    assert (ran.code, ran.facts["prompts"]) == (0, 3)
    found, expected = (FeatureStatistics.from_pretrained(tmp_path / name) for name in ("merged", "out"))
    assert found.facts == expected.facts
    torch.testing.assert_close(found.moments["text"].total, expected.moments["text"].total, rtol=1e-12, atol=0)
    ran = run("merge", parts[0], output_dir=tmp_path / "other")
    assert ran.code == 1
    assert "must be all 2 parts, got none for 1/2" in ran.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"knowledge_prompts": "nowhere.txt"}, "got nowhere.txt: no such file."),
        ({"pretrained_model_name_or_path": "./nowhere"}, "must be a folder or Hub name of a pipeline"),
        ({"features": "z"}, "'z'"),
        ({"cross_attention_layers": "first"}, "`--cross_attention_layers` must be 'all' or indices"),
        ({"cross_attention_layers": 99}, "99"),
        ({"compress": 0}, "`--compress` must be a share of the energy in (0, 1], got 0.0."),
        ({"num_inference_steps": 0}, "`--num_inference_steps` must be at least 1, got 0."),
        ({"seed": -1}, "`--seed` must be from 0 to 2^32 - 1, got -1."),
        ({"output_dir": __file__}, "`--output_dir` must be a folder"),
        ({"device": "abacus"}, "`--device` must be one of torch's, got 'abacus'."),
        ({"push_to_hub": True}, "`--license` must be given"),
        ({"shard": "4/4"}, "`--shard` must be an index and a count as in 0/4"),
        ({"shard": "0/4", "compress": 0.9}, "`--compress` must be left out with `--shard`, got 0.9"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(collect, hub, tmp_path, flags, message):
    ran = collect(**flags)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert message in ran.err
    assert not (tmp_path / "out").exists()
    assert not hub.repos

from __future__ import annotations

import logging
import re
from importlib.metadata import version

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi

from diffusers_ext.golden_noise.card import pair_set_card
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter, measured, num_rejected
from tests.golden_noise.pair_sets import SHAPE, STEPS, deltas_of, record, write_set
from tests.golden_noise.pairs.test_third_party import write_csv, write_official
from tests.golden_noise.shared_facts import RESULT, upload_base

FACTS = {
    "base_model": "somebody/base",
    "license": "mit",
    "trained_on": "8 prompts",
    "pipeline": "StableDiffusionPipeline",
    "reward": "brightness 1",
}
MADE = {
    "pretrained_model_name_or_path": "tester/base", "pipeline": "FluxPipeline", "w1": 5.5, "w2": 1.0,
    "redenoise_steps": 10, "noises_per_prompt": 2, "margin": 0.1, "seed": 0, "negative_prompt": "",
    "prompts": {"count": 7, "sha256": "0"}, "reward": {"name": "hpsv2", "version": "v2.1"},
}  # fmt: skip
SIZES = {"num_pairs": 6, "num_rejected": 2, "num_steps": 1, "latent_shape": SHAPE}


@pytest.fixture
def pairs(tmp_path):
    write_set(tmp_path / "set")
    return open_pairs(tmp_path / "set")


def assert_same(loaded, pairs) -> None:
    assert loaded.records == pairs.records
    assert loaded.facts == pairs.facts
    for found, expected in zip(loaded, pairs, strict=True):
        assert torch.equal(found["golden"], expected["golden"])


def test_sets_come_back_from_the_hub_and_datasets_reads_their_tables(hub, pairs, tmp_path):
    pairs.push_to_hub("tester/pairs", private=True, **FACTS)
    assert hub.repos["datasets/tester/pairs"].private
    assert_same(open_pairs("tester/pairs"), pairs)
    assert_same(open_pairs("tester/pairs", local_files_only=True), pairs)
    for name, indices in (("pairs", (0, 1, 2, 5, 6, 7)), ("rejected", (3, 4))):
        table = load_dataset("tester/pairs", name, split="train", cache_dir=str(tmp_path / "tables"))
        assert [PairRecord(**row) for row in table] == [record(index) for index in indices]
    card = DatasetCard(hub.files("tester/pairs", "dataset")["README.md"].decode())
    assert [config["config_name"] for config in card.data.configs] == ["pairs", "rejected"]
    for text in ('open_pairs("tester/pairs")', "2 were rejected", "8 prompts", "brightness 1", "0.875"):
        assert text in card.text


def test_what_was_never_written_whole_is_not_shared(hub, pairs):
    folder = pairs.folder
    for name in (".config.json.abc", "deltas/.00000.safetensors.xyz", "progress/00000/00001.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    pairs.push_to_hub("tester/pairs", **FACTS)
    shards = [f"{kind}/0000{n}" for kind in ("deltas", "pairs", "rejected", "shards") for n in (0, 1)]
    names = {name.split(".")[0] for name in hub.files("tester/pairs", "dataset")}
    assert names == {"README", "config", *shards}


def test_an_unfinished_set_is_shared_only_on_demand(hub, tmp_path, caplog):
    write_set(tmp_path / "set", finish=(1,))
    pairs = open_pairs(tmp_path / "set")
    with pytest.raises(ValueError, match=r"must hold all of its shards .* got 1: .*allow_unfinished"):
        pairs.push_to_hub("tester/pairs", **FACTS)
    assert not hub.repos
    pairs.push_to_hub("tester/pairs", allow_unfinished=True, **FACTS)
    assert not [name for name in hub.files("tester/pairs", "dataset") if "progress" in name]
    with caplog.at_level(logging.WARNING):
        assert not open_pairs("tester/pairs").complete
    assert "holds 1 of 2 shards" in caplog.text


def test_a_smaller_set_takes_the_place_of_a_larger_one(hub, pairs, tmp_path):
    for subfolder in ("one", "two"):
        pairs.push_to_hub("tester/pairs", subfolder=subfolder, **FACTS)
    writer = PairWriter(tmp_path / "small", SHAPE, STEPS, num_shards=1, facts=None)
    writer.create()
    writer.write_part(0, 0, deltas_of([1]), [record(1)])
    writer.finish_shard(0, 1)
    open_pairs(tmp_path / "small").push_to_hub("tester/pairs", subfolder="one", **FACTS)
    assert len(open_pairs("tester/pairs", subfolder="one")) == 1
    assert len(open_pairs("tester/pairs", subfolder="two")) == len(pairs)


def test_branches_folders_and_pull_requests(hub, pairs):
    for where in ({"subfolder": "small"}, {"revision": "v1"}):
        pairs.push_to_hub("tester/pairs", **where, **FACTS)
        assert_same(open_pairs("tester/pairs", **where), pairs)
    assert pairs.push_to_hub("tester/pairs", create_pr=True, **FACTS).endswith("/discussions/1")
    assert_same(open_pairs("tester/pairs", revision="refs/pr/1"), pairs)
    table = load_dataset("tester/pairs", "rejected", split="train")  # of the subfolder, by the card
    assert len(table) == 2
    with pytest.raises(ValueError, match="must be a folder of noise pairs, got none of config.json"):
        open_pairs("tester/pairs")


def test_a_download_that_was_cut_is_no_smaller_set(hub, pairs, tmp_path):
    pairs.push_to_hub("tester/pairs", **FACTS)
    hub.fail_next("GET", "deltas/00001", times=20, how="503")
    with pytest.raises(Exception, match="503|Broken"):  # noqa: PT011, B017
        open_pairs("tester/pairs", cache_dir=tmp_path / "cache")
    # Below 1.0 the Hub's library takes what is there for the whole.
    whole = int(version("huggingface_hub").split(".")[0]) >= 1
    refusal = "with `local_files_only` it must have been downloaded whole" if whole else "must hold deltas/00001"
    with pytest.raises(ValueError, match=refusal):
        open_pairs("tester/pairs", cache_dir=tmp_path / "cache", local_files_only=True)
    hub._failures.clear()
    assert_same(open_pairs("tester/pairs", cache_dir=tmp_path / "cache"), pairs)


def test_a_file_altered_on_the_hub_is_refused(hub, pairs):
    pairs.push_to_hub("tester/pairs", **FACTS)
    api = HfApi()
    file = (pairs.folder / "pairs/00000.parquet").read_bytes()
    api.upload_file(
        path_or_fileobj=file, path_in_repo="pairs/00001.parquet", repo_id="tester/pairs",
        repo_type="dataset",
    )  # fmt: skip
    with pytest.raises(ValueError, match="00001.parquet must have SHA-256 .* was altered"):
        open_pairs("tester/pairs")


@pytest.mark.parametrize("write", [write_official, write_csv])
def test_sets_of_others_are_read_from_the_hub(hub, tmp_path, write):
    write(tmp_path / "set", *([True] if write is write_csv else []))
    api = HfApi()
    api.create_repo("tester/pairs", repo_type="dataset")
    api.upload_folder(repo_id="tester/pairs", folder_path=tmp_path / "set", repo_type="dataset")
    loaded, pairs = open_pairs("tester/pairs"), open_pairs(tmp_path / "set")
    assert loaded.prompts == pairs.prompts
    assert torch.equal(loaded[0]["golden"], pairs[0]["golden"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`path` must be .* of noise pairs, got tester/none: no such folder, and no such repo"),
        ({"local_files_only": True}, "with `local_files_only` it must have been downloaded whole"),
    ],
)
def test_sets_that_are_not_there(hub, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_pairs("tester/none", **arguments)


def test_the_card_knows_how_the_set_was_made(hub):
    card = pair_set_card({**MADE, "pretrained_model_name_or_path": upload_base()}, **SIZES)
    card = card("tester/pairs")
    assert card.data.license == "openrail++"
    for text in (
        "Re-denoised with tester/base from 2 random noises for each of 7 prompts: a step down with "
        "guidance 5.5 and up with guidance 1, of 10 steps. Pairs whose picture gained more than 0.1 "
        "by hpsv2 v2.1 were kept",
        "`FluxPipeline`",
        "| redenoise\\_steps | 10 |",
    ):
        assert text in card.text
    assert "negative_prompt" not in card.text
    unfiltered = pair_set_card({**MADE, "reward": None}, license="mit", **SIZES)("tester/pairs")
    assert "All pairs were kept" in unfiltered.text
    assert "No reward filtered" in unfiltered.text


@pytest.mark.parametrize(
    ("made", "origin", "setting", "effect"),
    [
        (
            {"target": "reward", "num_inference_steps": 2, "ascent_steps": 6, "ascent_rate": 0.1, "no_filter": True},
            "By gradient ascent of hpsv2 v2.1 through 2 denoising steps of .*, 6 times 0.1 of .* All pairs were kept",
            r"\| ascent\\_steps \| 6 \|",
            "a reward",
        ),
        (
            {"target": "best_of_n", "best_of": 8, "spread": 0.5},
            "The best by hpsv2 v2.1 of 8 noises at a distance of 0.5 around 2 random noises .* were kept",
            r"\| spread \| 0.5 \|",
            "a reward",
        ),
        (
            {
                "target": "diversity",
                "num_inference_steps": 2,
                "diversity_gain": 2.0,
                "ascent_steps": 6,
                "ascent_rate": 0.1,
            },
            "predicts in the first of 2 steps lies 2 times its distance further .*: 6 steps of 0.1 .* were kept",
            r"\| diversity\\_gain \| 2.0 \|",
            "spreading",
        ),
    ],
)
def test_the_card_of_another_target_says_nothing_of_guidance(made, origin, setting, effect):
    text = pair_set_card({**MADE, **made}, license="mit", **SIZES)("tester/pairs").text
    assert re.search(origin, text)
    assert re.search(setting, text)
    assert f"effect of {effect}" in text
    assert "redenoise" not in text


def test_facts_that_a_set_lacks_must_be_given():
    for name, message in (
        ("base_model", "`base_model` must be given for the card of a set that does not know"),
        ("trained_on", "`trained_on` must be given"),
        ("pipeline", "`pipeline` must be given"),
        ("reward", "`reward` must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_set_card(None, **{**FACTS, name: None}, **SIZES)
    card = pair_set_card(None, **FACTS, **SIZES, results=[RESULT])("tester/pairs")
    assert "relative error" in card.text


def test_figures_are_those_of_all_pairs_that_were_tried(pairs):
    assert num_rejected(pairs.folder) == 2
    figures = {result.metric: result.value for result in measured(pairs.folder)}
    assert figures["win rate"] == 0.875  # item 0 gains nothing
    assert figures["mean reward of golden noise"] == pytest.approx(0.1 + sum(range(8)) / 8)
    assert pairs.num_steps == STEPS

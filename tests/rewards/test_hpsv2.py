from __future__ import annotations

import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext.rewards import HPSv2Reward
from diffusers_ext.rewards.hpsv2 import locate_checkpoint
from examples.digits.prompts import make_tokenizer
from tests.rewards.hpsv2_fixtures import (
    CASES,
    PROMPTS,
    official_tensors,
    pictures,
    tiny_checkpoint,
    tiny_config,
)


TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def reward(load_hpsv2) -> HPSv2Reward:
    return load_hpsv2()


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return official_tensors()


def official_scores(key: str) -> torch.Tensor:
    return torch.tensor([CASES[key][name] for name in CASES["image_feature_order"]])


def every_pair() -> tuple[list[Image.Image], list[str]]:
    images = pictures()
    return [image for image in images for _ in PROMPTS], PROMPTS * len(images)


def test_features_are_the_official_ones(reward, official):
    images, texts = reward.image_features(pictures()), reward.text_features(PROMPTS)
    assert torch.allclose(images, official["image_features"], atol=TOLERANCE, rtol=0)
    assert torch.allclose(texts, official["text_features"], atol=TOLERANCE, rtol=0)


def test_projections_are_the_official_ones_before_normalising(reward, official):
    found = reward.model.get_text_features(**reward._tokens(PROMPTS)).pooler_output
    assert torch.allclose(found, official["text_features_unnormalized"], atol=2e-5, rtol=0)
    pixels = reward._pixel_values(pictures())
    found = reward.model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.allclose(found, official["image_features_unnormalized"], atol=2e-5, rtol=0)


def test_scores_of_all_pairs_are_the_official_ones(reward):
    scores = reward.score(*every_pair())
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    expected = official_scores("scores_antialias").flatten()
    assert torch.allclose(scores, expected, atol=TOLERANCE, rtol=0)
    assert (reward.name, reward.version) == ("hpsv2", "v2.0")


def test_scores_without_antialiasing_are_those_of_an_older_torchvision(load_hpsv2, official):
    reward = load_hpsv2(antialias=False)
    expected = official_scores("scores_no_antialias").flatten()
    assert torch.allclose(reward.score(*every_pair()), expected, atol=TOLERANCE, rtol=0)
    expected = official["image_features_no_antialias"]
    assert torch.allclose(reward.image_features(pictures()), expected, atol=TOLERANCE, rtol=0)
    assert reward.version == "v2.0+no-antialias"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_nothing_but_rounding(reward, load_hpsv2, batch_size):
    pairs = every_pair()
    found = load_hpsv2(batch_size=batch_size).score(*pairs)
    assert torch.allclose(found, reward.score(*pairs), atol=1e-6, rtol=0)


def test_every_distinct_prompt_is_read_once(load_hpsv2, monkeypatch):
    reward, read = load_hpsv2(batch_size=2), []
    tokens = reward._tokens
    monkeypatch.setattr(reward, "_tokens", lambda prompts: read.append(prompts) or tokens(prompts))
    reward.score(pictures(), ["b", "a", "b", "c"])
    assert read == [["b", "a"], ["c"]]


def test_v2_1_is_the_other_file_and_the_default(hpsv2_folder, load_hpsv2, reward):
    newer = HPSv2Reward.from_pretrained(hpsv2_folder, config=tiny_config())
    assert newer.version == "v2.1"
    pairs = pictures(), PROMPTS[:4]
    assert (newer.score(*pairs) - reward.score(*pairs)).abs().max() > 0.01
    assert torch.equal(newer.score(*pairs), load_hpsv2(version="v2.1").score(*pairs))


def test_the_file_itself_and_safetensors_load_too(hpsv2_folder, reward, tmp_path):
    save_file(tiny_checkpoint(), tmp_path / "HPS_v2_compressed.safetensors")
    shutil.copy(hpsv2_folder / "tokenizer.json", tmp_path)
    shutil.copy(hpsv2_folder / "tokenizer_config.json", tmp_path)
    pairs = pictures(), PROMPTS[:4]
    for source in (tmp_path, tmp_path / "HPS_v2_compressed.safetensors"):
        loaded = HPSv2Reward.from_pretrained(source, version="v2.0", config=tiny_config())
        assert torch.equal(loaded.score(*pairs), reward.score(*pairs))


def test_half_precision_scores_are_near_and_float32(load_hpsv2, reward):
    half = load_hpsv2(dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    found, expected = (scorer.score(*every_pair()) for scorer in (half, reward))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 4e-3


def test_the_model_is_frozen_in_eval_mode_and_moves(load_hpsv2):
    reward = load_hpsv2()
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert reward.to("meta") is reward
    assert reward.model.device.type == "meta"


def test_no_picture_wrong_pairs_and_nan_are_refused(load_hpsv2):
    reward = load_hpsv2()
    with pytest.raises(ValueError, match="`images` must hold at least one picture"):
        reward.score([], [])
    with pytest.raises(ValueError, match=r"one prompt per image \(4\)"):
        reward.score(pictures(), PROMPTS[:3])
    reward.model.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of 'hpsv2' must be numbers, got nan for 4 of 4"):
        reward.score(pictures(), PROMPTS[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "v2"}, r"`version` must be one of \['v2.0', 'v2.1'\], got 'v2'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(load_hpsv2, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_hpsv2(**arguments)


def test_another_models_tokenizer_is_refused(load_hpsv2, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`tokenizer` must be the one of the model, with 49407"):
        load_hpsv2(tokenizer=tmp_path)


def test_the_published_structure_is_expected_unless_a_config_says_otherwise(hpsv2_folder):
    with pytest.raises(ValueError, match="exactly the weights of the model, got 832 missing"):
        HPSv2Reward.from_pretrained(hpsv2_folder, version="v2.0")


def test_ftfy_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_ext\[rewards\]'"):
        HPSv2Reward.from_pretrained(tmp_path)


def test_a_checkpoint_is_found_by_its_versions_name(hpsv2_folder, tmp_path):
    assert locate_checkpoint(hpsv2_folder, "v2.1", {}).name == "HPS_v2.1_compressed.pt"
    with pytest.raises(ValueError, match="`version` must be 'v2.0' for HPS_v2_compressed.pt"):
        locate_checkpoint(hpsv2_folder / "HPS_v2_compressed.pt", "v2.1", {})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"must hold HPS_v2_compressed.pt .*\['notes.txt'\]"):
        locate_checkpoint(tmp_path, "v2.0", {})
    with pytest.raises(ValueError, match="a file, a folder or 'user/name', got .*absent"):
        locate_checkpoint(tmp_path / "absent", "v2.0", {})
    mine = shutil.copy(hpsv2_folder / "HPS_v2_compressed.pt", tmp_path / "mine.pt")
    assert locate_checkpoint(mine, "v2.1", {}) == mine


def test_the_hub_is_asked_for_the_versions_file(hpsv2_folder, monkeypatch):
    asked = []

    def download(repository, name, **arguments):
        asked.append((repository, name, arguments))
        return str(hpsv2_folder / name)

    monkeypatch.setattr("diffusers_ext.rewards.hpsv2.hf_hub_download", download)
    reward = HPSv2Reward.from_pretrained(config=tiny_config(), revision="main", token="t")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt", {"revision": "main", "token": "t"})]
    assert isinstance(reward, HPSv2Reward)

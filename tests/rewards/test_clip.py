from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.rewards import CLIPScoreReward, PickScoreReward
from diffusers_ext.rewards.clip import projected_features
from tests.rewards.hpsv2_fixtures import clip_tokenizer, official_tensors, pictures

PROMPTS = ["a red seven", "a photo of the digit three", "a red seven", "two"]


@pytest.fixture
def reward(clip_folder) -> CLIPScoreReward:
    return CLIPScoreReward.from_pretrained(clip_folder, local_files_only=True)


def test_pictures_of_any_mode_and_size_are_scored_one_by_one_as_in_a_batch(reward, clip_folder):
    images = pictures()
    images[0].putalpha(128)
    assert {image.mode for image in images} == {"RGB", "L", "RGBA"}
    scores = reward.score(images, PROMPTS)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    single = CLIPScoreReward.from_pretrained(clip_folder, batch_size=1)
    assert torch.allclose(single.score(images, PROMPTS), scores, atol=1e-4, rtol=0)
    swapped = reward.score(images[::-1], PROMPTS[::-1])
    assert torch.allclose(swapped.flip(0), scores, atol=1e-4, rtol=0)


def test_features_are_the_models_own(reward):
    pixels = reward.image_processor(images=[rgb_picture(image) for image in pictures()], return_tensors="pt")
    expected = projected_features(reward.model.get_image_features(**pixels))
    found = reward.image_features(pictures())
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-6)
    tokens = reward.tokenizer("a red seven", return_tensors="pt")
    expected = projected_features(reward.model.get_text_features(**tokens))
    found = reward.text_features(PROMPTS)[:1]
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-6)


def test_a_long_prompt_is_cut_off(reward):
    long = "red seven " * 10
    features = reward.text_features([long, long + "blue"])
    assert torch.equal(features[0], features[1])


def test_the_processor_may_be_elsewhere(clip_folder, tmp_path, reward):
    words = tmp_path / "words"
    words.mkdir()
    for file in clip_folder.iterdir():
        weights = file.name in ("model.safetensors", "config.json")
        shutil.copy(file, tmp_path if weights else words)
    separate = PickScoreReward.from_pretrained(tmp_path, processor=words, revision="other")
    assert torch.equal(separate.text_features(PROMPTS), reward.text_features(PROMPTS))
    with pytest.raises(OSError, match="preprocessor_config.json"):
        PickScoreReward.from_pretrained(tmp_path, local_files_only=True)


def test_another_kind_of_model_is_refused(tmp_path):
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a model of type 'clip', got 'dinov2'"):
        CLIPScoreReward.from_pretrained(tmp_path)


def test_missing_weights_are_not_made_up(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="got none for 1 of them, the first text_projection.we"):
        CLIPScoreReward.from_pretrained(folder)


def test_another_models_tokenizer_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "mixed")
    clip_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"`tokenizer` must be the one of the model.*got 49407"):
        CLIPScoreReward.from_pretrained(folder)


def test_a_tokenizer_fits_a_config_with_the_legacy_end_token(clip_folder, tmp_path, reward):
    folder = shutil.copytree(clip_folder, tmp_path / "legacy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    legacy = CLIPScoreReward.from_pretrained(folder)
    assert torch.equal(legacy.text_features(PROMPTS), reward.text_features(PROMPTS))


@pytest.mark.parametrize("kind", [CLIPScoreReward, PickScoreReward])
def test_wrong_pairs_and_nan_are_refused(kind, clip_folder):
    reward = kind.from_pretrained(clip_folder)
    with pytest.raises(ValueError, match="`images` must hold at least one picture"):
        reward.score([], [])
    with pytest.raises(ValueError, match=r"one prompt per image \(4\)"):
        reward.score(pictures(), PROMPTS[:3])
    reward.model.text_projection.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"scores of '{reward.name}' must be numbers, got nan"):
        reward.score([Image.new("RGB", (8, 8))], ["two"])


def test_the_cosine_counts_in_hundredths_from_zero():
    found = CLIPScoreReward._from_cosines(None, torch.tensor([1.0, 0.25, 0.0, -0.3]))
    assert found.tolist() == [100.0, 25.0, 0.0, 0.0]


def test_scores_are_those_of_the_features(clip_folder):
    reward = CLIPScoreReward.from_pretrained(clip_folder)
    images, prompts = pictures(), ["a red seven", "two", "a red seven", "three"]
    images, prompts = images * 2, prompts + ["blue", "green", "nine", "one"]
    cosines = (reward.image_features(images) * reward.text_features(prompts)).sum(1)
    found = reward.score(images, prompts)
    assert torch.allclose(found, 100 * cosines.clamp(min=0), atol=1e-3, rtol=0)
    assert found.max() > 0


def test_the_version_is_the_model(clip_folder):
    reward = CLIPScoreReward.from_pretrained(clip_folder)
    assert (reward.name, reward.version) == ("clip_score", clip_folder.name)
    assert CLIPScoreReward.from_pretrained(clip_folder, version="mine").version == "mine"


def test_scores_and_preference_are_those_of_the_recipe():
    tensors = official_tensors()
    cosines = tensors["image_features"][:2] @ tensors["text_features"][2]
    reward = SimpleNamespace(model=SimpleNamespace(logit_scale=torch.tensor(math.log(100))))
    scores = PickScoreReward._from_cosines(reward, cosines)
    assert torch.allclose(scores, torch.tensor([1.3120, 2.9555]), atol=1e-3)
    assert torch.allclose(scores.softmax(0), torch.tensor([0.1620, 0.8380]), atol=1e-3)


@pytest.mark.parametrize("logit_scale", [3.0, 0.5])
def test_the_models_own_scale_is_used(clip_folder, logit_scale):
    reward = PickScoreReward.from_pretrained(clip_folder)
    assert reward.model.logit_scale.item() == 3.0
    reward.model.logit_scale.data.fill_(logit_scale)
    images, prompts = pictures(), ["a red seven", "two", "a red seven", "three"]
    cosines = (reward.image_features(images) * reward.text_features(prompts)).sum(1)
    expected = math.exp(logit_scale) * cosines
    assert torch.allclose(reward.score(images, prompts), expected, atol=1e-4, rtol=0)


def test_name_and_version(clip_folder):
    reward = PickScoreReward.from_pretrained(clip_folder)
    assert (reward.name, reward.version) == ("pickscore", "v1")
    assert PickScoreReward.from_pretrained(clip_folder, version="mine").version == "mine"


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_scores_of_tensors_are_those_of_pictures_and_have_a_gradient(clip_folder, size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4, generator=generator), size, mode="bicubic")
    pixels = (pixels.clamp(0, 1) * 255).round().div(255).requires_grad_()
    images = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in pixels.detach()]
    for reward_class in (CLIPScoreReward, PickScoreReward):
        reward = reward_class.from_pretrained(clip_folder)
        scores = reward.score_pixels(pixels, PROMPTS[:2])
        wanted = reward.score(images, PROMPTS[:2])
        torch.testing.assert_close(scores.detach(), wanted, atol=0.05, rtol=0.01)
        (slope,) = torch.autograd.grad(scores.sum(), pixels)
        # CLIPScore is 0, and flat, where picture and prompt point apart.
        assert torch.equal(slope.abs().amax((1, 2, 3)) > 0, scores != 0)
        assert scores.max() > 0

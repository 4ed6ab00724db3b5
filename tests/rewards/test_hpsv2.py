from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext.rewards import HPSv2Reward
from diffusers_ext.rewards.clip import projected_features
from diffusers_ext.rewards.hpsv2 import CLIP_MEAN, CLIP_STD, clean_prompt, letterbox, locate_checkpoint, token_ids
from examples.digits.prompts import make_tokenizer
from tests.rewards.hpsv2_fixtures import (
    CASES,
    PROMPTS,
    clip_tokenizer,
    official_tensors,
    picture,
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
    found = projected_features(reward.model.get_text_features(**reward._tokens(PROMPTS)))
    assert torch.allclose(found, official["text_features_unnormalized"], atol=2e-5, rtol=0)
    pixels = reward._pixel_values(pictures())
    found = projected_features(reward.model.get_image_features(pixel_values=pixels))
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


def test_the_file_itself_and_safetensors_load_too(reward, tmp_path):
    save_file(tiny_checkpoint(), tmp_path / "HPS_v2_compressed.safetensors")
    clip_tokenizer().save_pretrained(tmp_path)
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


STEP = 4  # the fixture holds every fourth row and column
# (top, left, height, width) of the picture in the square
BOXES = {"rgb": (37, 0, 149, 224), "gray": (0, 37, 224, 149), "rgba": (33, 0, 158, 224), "small": (32, 0, 159, 224)}
BLACK = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    return pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]


@pytest.mark.parametrize(
    ("name", "key", "antialias"),
    [
        ("rgb", "pixel_values.rgb", True),
        ("gray", "pixel_values.gray", True),
        ("small", "pixel_values.small", True),
        ("rgba", "pixel_values.rgba_4ch", True),
        ("rgb", "pixel_values_no_antialias.rgb", False),
    ],
)
def test_pixels_are_the_official_ones(name, key, antialias):
    # The official code fails on an alpha channel; what it makes of the others is in the fixture.
    found = letterbox(picture(name).convert("RGB"), antialias=antialias)
    assert found.shape == (3, 224, 224)
    assert found.dtype == torch.float32
    expected = official_tensors()[key].float()
    assert torch.allclose(found[:, ::STEP, ::STEP], expected, atol=2e-3, rtol=0)


def test_pictures_are_read_as_they_look():
    grey = np.full((40, 40), 20000, np.uint16)
    grey[10:30, 10:30] = 50000
    shown = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    assert torch.equal(letterbox(Image.fromarray(grey)), letterbox(shown))
    cut_out = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert torch.equal(letterbox(cut_out), letterbox(Image.new("RGB", (40, 40), "white")))


def test_antialiasing_changes_the_pixels():
    difference = letterbox(picture("rgb")) - letterbox(picture("rgb"), antialias=False)
    assert difference.abs().max() > 0.5


@pytest.mark.parametrize("name", BOXES)
def test_the_whole_picture_lies_on_black(name):
    top, left, height, width = BOXES[name]
    found = letterbox(picture(name))
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(found[:, ~inside], BLACK[:, None].expand(-1, int((~inside).sum())))
    edges = found[:, top, left + width // 2], found[:, top + height - 1, left + width // 2]
    assert all((edge - BLACK).abs().max() > 0.05 for edge in edges)


def test_overshoots_of_the_bicubic_filter_are_kept():
    step = np.zeros((40, 40, 3), dtype=np.uint8)
    step[:, 20:] = 255
    values = to_unit(letterbox(Image.fromarray(step)))
    assert values.min() < -0.01
    assert values.max() > 1.01


@pytest.mark.parametrize("size", [(224, 224), (224, 100), (31, 224)])
def test_a_picture_of_the_right_length_is_not_resized(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    values = to_unit(letterbox(Image.fromarray(pixels)))
    top, left = (224 - size[1]) // 2, (224 - size[0]) // 2
    found = values[:, top : top + size[1], left : left + size[0]]
    assert torch.allclose(found, torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=1e-6)


def test_a_line_of_pixels_stays_a_line():
    values = to_unit(letterbox(Image.new("RGB", (1000, 1), "white")))
    assert values.amax((0, 2)).gt(0.5).nonzero().flatten().tolist() == [111]


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.mark.parametrize("case", CASES["prompts"], ids=lambda case: case["name"])
def test_prompts_are_cleaned_as_officially(case):
    assert clean_prompt(case["text"]) == case["cleaned"]


@pytest.mark.parametrize("case", CASES["prompts"], ids=lambda case: case["name"])
def test_tokens_are_the_official_ones(case, tokenizer):
    ids = token_ids(tokenizer, [case["text"]])
    padding = [0] * (77 - len(case["ids"]))
    assert ids.tolist() == [case["ids"] + padding]


def test_a_batch_of_prompts_has_the_tokens_of_each(tokenizer):
    ids = token_ids(tokenizer, PROMPTS)
    assert ids.dtype == torch.long
    assert torch.equal(ids, official_tensors()["input_ids"].long())


def test_the_tokenizer_alone_reads_three_of_the_prompts_otherwise(tokenizer):
    differ = {
        case["name"]
        for case in CASES["prompts"]
        if tokenizer(case["text"], truncation=True, max_length=77).input_ids != case["ids"]
    }
    # That of transformers 4 cleans by ftfy itself.
    assert differ == ({"non_ascii", "html", "mojibake_fullwidth"} if tokenizer.is_fast else set())


def test_a_longer_prompt_ends_with_the_end_token(tokenizer):
    ids = token_ids(tokenizer, ["a " * 30, ""], length=8)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert ids[1].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]


def test_without_ftfy_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers_ext\[rewards\]'"):
        clean_prompt("a cat")


def test_scores_of_tensors_are_those_of_pictures_and_have_a_gradient(load_hpsv2):
    images, reward = [image for image in pictures() if image.mode == "RGB"][:1], load_hpsv2()
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])
    pixels.requires_grad_()
    scores = reward.score_pixels(pixels, PROMPTS[:1])
    torch.testing.assert_close(scores.detach(), reward.score(images, PROMPTS[:1]))
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    assert slope.abs().max() > 0

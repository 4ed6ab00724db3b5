from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from diffusers_ext.evaluation.features import CLIPFeatures, DINOv2Features, PixelFeatures
from diffusers_ext.rewards.clip import projected_features
from examples.digits.prompts import make_tokenizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(count: int, size: tuple[int, int] = (40, 40)) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shape = (count, size[1], size[0], 3)
    return [Image.fromarray(p) for p in generator.integers(0, 256, shape, dtype=np.uint8)]


def write_preprocessing(folder, kind: str, size: int) -> None:
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": size + 4},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def preprocess(picture: Image.Image, size: int) -> torch.Tensor:
    large = picture.convert("RGB").resize((size + 4, size + 4), Image.Resampling.BICUBIC)
    pixels = np.asarray(large.crop((2, 2, size + 2, size + 2))) / 255
    pixels = (pixels - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture
def dinov2(tmp_path) -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    write_preprocessing(tmp_path, "BitImageProcessor", 28)
    return model


@pytest.fixture
def clip(tmp_path) -> CLIPModel:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "intermediate_size": 24}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_preprocessing(tmp_path, "CLIPImageProcessor", 32)
    return model


def test_pixel_features_are_the_pixels():
    images = pictures(3, (4, 2))
    found = PixelFeatures().extract(images)
    assert found.dtype == torch.float32
    assert found.shape == (3, 24)
    assert torch.equal(found[1], torch.from_numpy(np.asarray(images[1]) / 255).flatten().float())


def test_pixel_features_of_several_sizes_need_one_size():
    images = [*pictures(1, (8, 8)), *pictures(1, (4, 6))]
    assert PixelFeatures(size=4).extract(images).shape == (2, 48)
    with pytest.raises(ValueError, match=r"must share one size, got \[\(4, 6\), \(8, 8\)\]"):
        PixelFeatures().extract(images)
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        PixelFeatures(size=0)


def test_pixel_features_see_grey_pictures_as_rgb():
    grey = Image.new("L", (2, 2), 51)
    assert torch.allclose(PixelFeatures().extract([grey]), torch.full((1, 12), 0.2))


@pytest.mark.parametrize("images", [[], [torch.zeros(3, 4, 4)]])
def test_what_is_no_picture_is_refused(images):
    with pytest.raises(ValueError, match="`images` must be a non-empty list of PIL images, got"):
        PixelFeatures().extract(images)


def test_dinov2_features_are_the_normalised_class_token(dinov2, tmp_path):
    images = [*pictures(3), Image.new("L", (60, 60), 90)]
    extractor = DINOv2Features.from_pretrained(tmp_path, batch_size=3)
    pixels = torch.cat([preprocess(image, 28) for image in images])
    with torch.no_grad():
        expected = F.normalize(dinov2(pixel_values=pixels).last_hidden_state[:, 0], dim=1)
    found = extractor.extract(images)
    assert found.shape == (4, 16)
    # The processor rounds to bytes after resizing, as PIL does.
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(found.norm(dim=1), torch.ones(4))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_features_do_not_depend_on_the_batch_size(dinov2, tmp_path):
    images = pictures(5)
    one, all_at_once = (DINOv2Features.from_pretrained(tmp_path, batch_size=size).extract(images) for size in (1, 8))
    assert torch.allclose(one, all_at_once, atol=1e-6)


def test_models_are_frozen_and_run_in_the_asked_dtype(dinov2, tmp_path):
    extractor = DINOv2Features.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not extractor.model.training
    assert not any(parameter.requires_grad for parameter in extractor.model.parameters())
    assert extractor.model.dtype == torch.bfloat16
    found = extractor.extract(pictures(2))
    assert found.dtype == torch.float32
    exact = DINOv2Features.from_pretrained(tmp_path).extract(pictures(2))
    assert 0 < (found - exact).abs().max() < 0.1


def test_dinov2_with_registers_is_read_too(tmp_path):
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    write_preprocessing(tmp_path, "BitImageProcessor", 28)
    assert DINOv2Features.from_pretrained(tmp_path).extract(pictures(2)).shape == (2, 16)


def test_clip_features_equal_the_models_own(clip, tmp_path):
    images = pictures(3)
    found = CLIPFeatures.from_pretrained(tmp_path, batch_size=2).extract(images)
    pixels = torch.cat([preprocess(image, 32) for image in images])
    with torch.no_grad():
        expected = projected_features(clip.get_image_features(pixel_values=pixels))
    assert found.shape == (3, 10)
    assert torch.allclose(found, F.normalize(expected, dim=1), atol=1e-4)


def test_text_similarity_is_the_cosine_of_each_picture_and_its_prompt(clip, tmp_path):
    images, prompts = pictures(3), ["a red seven", "a photo of a blue one", "a red seven"]
    extractor = CLIPFeatures.from_pretrained(tmp_path)
    found = extractor.text_similarity(images, prompts)
    features, expected = extractor.extract(images), []
    for row, prompt in zip(features, prompts, strict=True):
        tokens = make_tokenizer()(prompt, return_tensors="pt")
        with torch.no_grad():
            text = projected_features(clip.get_text_features(**tokens))[0]
        expected.append(F.cosine_similarity(row, text, dim=0))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert found.shape == (3,)


def test_a_prompt_that_clip_cuts_off_is_logged(clip, tmp_path, caplog):
    extractor = CLIPFeatures.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        extractor.text_similarity(pictures(1), ["a red seven"])
        assert not caplog.records
        extractor.text_similarity(pictures(1), [" ".join(["red"] * 20)])
    assert "CLIP reads 12 tokens; the rest of 'red red" in caplog.text


@pytest.mark.parametrize("prompts", [["a red seven"], "ab"])
def test_text_similarity_needs_one_prompt_per_picture(clip, tmp_path, prompts):
    extractor = CLIPFeatures.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one prompt per image \(2\), got"):
        extractor.text_similarity(pictures(2), prompts)


def test_a_model_of_another_kind_is_refused(dinov2, tmp_path):
    with pytest.raises(ValueError, match=r"must be a model of type \('clip',\), got 'dinov2'"):
        CLIPFeatures.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(dinov2, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    torch.save(dinov2.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        DINOv2Features.from_pretrained(tmp_path)


def test_the_batch_size_must_be_positive(dinov2, tmp_path):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        DINOv2Features.from_pretrained(tmp_path, batch_size=0)

from __future__ import annotations

import argparse

import pytest
import torch

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.run.base_model import load_text_pipeline, stored_fingerprint
from tests.golden_noise.golden_pipelines import FAMILIES as FAMILIES_OF_GOLDEN_NOISE
from tests.tiny_current_pipelines import tiny_flux2_pipeline, tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ["a red seven", "a blue three of a green one"]
FAMILIES = {
    "sd": random_digits_pipeline,
    "sdxl": sdxl_pipeline,
    "hunyuan_dit": tiny_hunyuan_dit_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "flux2_dev": FAMILIES_OF_GOLDEN_NOISE["flux2_dev"].plain,
    "qwen_image": tiny_qwen_image_pipeline,
    "z_image": tiny_z_image_pipeline,
}


def args(path, **values) -> argparse.Namespace:
    usual = {"revision": None, "variant": None, "mixed_precision": "no"}
    return argparse.Namespace(pretrained_model_name_or_path=str(path), **{**usual, **values})


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_encoded_as_by_the_whole_pipeline(family, tmp_path):
    whole = FAMILIES[family]()
    whole.save_pretrained(tmp_path)
    light = load_text_pipeline(args(tmp_path), torch.device("cpu"))
    assert light.vae is None
    expected = encode_prompts(whole, PROMPTS)
    cache = TextCache.encode(light, [*PROMPTS, PROMPTS[0]], batch_size=1, dtype=torch.float32)
    text = cache.take(torch.tensor([cache.rows[prompt] for prompt in PROMPTS]), torch.device("cpu"))
    for name in ("prompt_embeds", "attention_mask", "pooled_prompt_embeds"):
        found, wanted = getattr(text, name), getattr(expected, name)
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted)
    denoiser = "unet" if hasattr(whole, "unet") else "transformer"
    assert not isinstance(getattr(light, denoiser), torch.nn.Module)
    assert stored_fingerprint(args(tmp_path)) == fingerprint(getattr(whole, denoiser))


def test_variants_have_files_of_their_own(tmp_path):
    whole = random_digits_pipeline()
    whole.save_pretrained(tmp_path)
    other = random_digits_pipeline(seed=1)
    other.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert stored_fingerprint(args(tmp_path)) == fingerprint(whole.unet)
    assert stored_fingerprint(args(tmp_path, variant="fp16")) == fingerprint(other.unet)


def test_without_weights_the_structure_is_compared(tmp_path):
    whole = random_digits_pipeline()
    whole.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    expected = {"architecture": fingerprint(whole.unet)["architecture"], "probe": []}
    assert stored_fingerprint(args(tmp_path)) == expected


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or Hub name of a pipeline"):
        load_text_pipeline(args(tmp_path), torch.device("cpu"))

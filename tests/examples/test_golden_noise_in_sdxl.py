"""Golden noise beside random noise of the same seed, in SDXL and others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffusers_ext import GoldenNoiseModel
from examples.golden_noise_in_sdxl import PIPELINES, main
from tests.examples.picture_files import read_frames
from tests.tiny_pipelines import sdxl_pipeline


def test_random_noise_is_left_and_golden_noise_right(tmp_path):
    prompt = "a red seven"
    sdxl_pipeline().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    network = GoldenNoiseModel(sample_size=8, text_embed_dim=80, width=16, num_layers=1, num_heads=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(tmp_path / "network")
    main(
        ["--model", str(tmp_path / "model"), "--noise_model", str(tmp_path / "network"),
         "--prompt", prompt, "--seeds", "3", "8", "--num_inference_steps", "2",
         "--output", str(tmp_path / "new" / "sheet.png")]
    )  # fmt: skip
    sheet = read_frames(tmp_path / "new" / "sheet.png")[0]
    [plain] = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")(
        prompt, num_inference_steps=2, guidance_scale=5.5, generator=torch.Generator().manual_seed(3)
    ).images
    shown = np.asarray(plain.resize((96, 96), Image.Resampling.NEAREST))
    left, shift = 266, 102  # of the first column, and from it to the next
    found = [t for t in range(80) if np.array_equal(sheet[t : t + 96, left : left + 96], shown)]
    assert len(found) == 1
    top, left = found[0], left + shift
    golden = sheet[top : top + 96, left : left + 96].astype(int)
    assert np.abs(golden - shown).mean() > 1


@pytest.mark.parametrize("plain", PIPELINES)
def test_every_family_has_its_own_pipeline(plain):
    assert plain in {base.__name__ for base in PIPELINES[plain].__mro__[1:]}

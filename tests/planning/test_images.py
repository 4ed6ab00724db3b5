from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.planning.models import (
    ImageShapes,
    encode_prompts_work,
    guided_work,
    read_base_model,
    redenoise_work,
    vae_work,
)
from diffusers_ext.planning.settings import GoldenNoisePlanSettings
from diffusers_ext.planning.work import Precision, trace_work
from tests.planning.real_jobs import measured_peak
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

PIPELINES = {
    "sdxl": sdxl_pipeline,
    "hunyuan_dit": tiny_hunyuan_dit_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
}
ON_CPU = Precision(torch.float32, as_on_gpu=False)


@pytest.mark.parametrize("family", PIPELINES)
def test_prompts_and_peaks_are_those_of_the_pipeline(tmp_path, family):
    pipeline = PIPELINES[family]()
    pipeline.save_pretrained(tmp_path)
    shapes = ImageShapes(read_base_model(tmp_path), 64)
    assert shapes.family.name == family
    real = encode_prompts(pipeline, ["a red seven", "a blue three"]).tensors()
    planned = shapes.conditioning(2, torch.device("cpu"), torch.float32).tensors()
    assert {n: t.shape for n, t in planned.items()} == {n: t.shape for n, t in real.items()}
    works = [
        encode_prompts_work(shapes, 2, 1, ON_CPU),
        redenoise_work(shapes, GoldenNoisePlanSettings(num_steps=2), 2, 1, ON_CPU),
        guided_work(shapes, 2, 5.0, 1, ON_CPU),
        vae_work(shapes, 2, 1, torch.float32, decodes=True),
        vae_work(shapes, 2, 1, torch.float32, decodes=False),
    ]
    for work in works:
        # In so small a call the workspaces of kernels, which no shape tells, are up to a fifth.
        assert 0.75 < trace_work(work).peak / measured_peak(work) < 1.05, work.name


def test_sizes_of_published_models():
    found = {name: ImageShapes(read_base_model(name)) for name in ("SD1.5", "SDXL", "SD3", "FLUX.1-dev")}
    assert [shapes.resolution for shapes in found.values()] == [512, 1024, 1024, 1024]
    assert found["SDXL"].latents == (4, 128, 128)
    assert found["FLUX.1-dev"].latents == (16, 128, 128)
    assert found["FLUX.1-dev"].embedded_guidance
    assert found["SDXL"].text.pooled == 1280
    assert (found["SD3"].text.tokens, found["SD3"].text.width) == (77 + 256, 4096)
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 16 for .*, got 1000"):
        ImageShapes(read_base_model("FLUX.1-dev"), 1000)

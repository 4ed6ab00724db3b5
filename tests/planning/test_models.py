from __future__ import annotations

import json

import pytest
import torch

from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.planning.models import (
    ImageShapes,
    encode_prompts_work,
    guided_work,
    published_names,
    read_base_model,
    redenoise_work,
    vae_work,
)
from diffusers_ext.planning.settings import GoldenNoisePlanSettings
from diffusers_ext.planning.work import Precision, trace_work
from examples.digits.check_model import MODEL_DIR
from tests.planning.real_jobs import measured_peak
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline

# As the model pages and the sizes of the published files say.
COUNTS = {
    "SD1.5": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "SD2.1": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "SDXL": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "SD3": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656},
    "FLUX.1-dev": {"transformer": 11_901_408_320, "vae": 83_819_683},
    "FLUX.1-schnell": {"transformer": 11_891_178_560},
    "FLUX.2-klein-4B": {"transformer": 3_875_544_576, "text_encoder": 4_022_468_096},
    "FLUX.2-klein-9B": {"transformer": 9_078_581_248, "text_encoder": 8_190_735_360},
    "SD3.5-medium": {"transformer": 2_243_171_520},
    "SD3.5-large": {"transformer": 8_056_627_520},
    "Qwen-Image": {"transformer": 20_430_401_088},
    "Z-Image-Turbo": {"transformer": 6_154_908_736},
    "Wan2.1-1.3B": {"transformer": 1_418_996_800},
    "Wan2.1-14B": {"transformer": 14_288_491_584},
    "Wan2.2-A14B": {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584},
    "Wan2.2-5B": {"transformer": 4_999_787_712},
    "Hunyuan-DiT": {"transformer": 1_516_534_048},
    "CogVideoX-2b": {"transformer": 1_693_783_872},
    "CogVideoX-5b": {"transformer": 5_570_283_072},
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_numbers_of_parameters(name):
    components = read_base_model(name).components
    found = {part: components[part].parameters() for part in COUNTS[name]}
    assert found == COUNTS[name]


def test_parameters_that_are_published_in_thousands_of_millions():
    components = read_base_model("FLUX.2-dev").components
    found = {name: round(part.parameters() / 1e9) for name, part in components.items()}
    assert found == {"vae": 0, "text_encoder": 24, "transformer": 32}


def test_names_in_any_spelling():
    assert set(COUNTS) <= set(published_names())
    same = ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "Stable-Diffusion-XL-base-1.0")
    assert len({read_base_model(name).name for name in same}) == 1
    assert read_base_model("zai-org/CogVideoX1.5-5B").denoiser == "transformer"
    # 4 bytes a parameter, the safety checker among them
    sd15 = read_base_model("sd-1.5")
    assert sd15.download == 4 * sum(part.parameters() for part in sd15.components.values())
    assert "safety_checker" in sd15.components


def test_folders_are_read_without_weights(tmp_path):
    base = read_base_model(MODEL_DIR)
    assert (base.pipeline, base.denoiser, base.download) == ("StableDiffusionPipeline", "unet", 0)
    assert base.text_encoders == ["text_encoder"]
    half = base.components["unet"].bytes(torch.float16)
    assert base.components["unet"].bytes(torch.float32) == 2 * half
    assert base.components["unet"].whole_config().sample_size == 8
    with pytest.raises(ValueError, match="got one without .*model_index.json"):
        read_base_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        read_base_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"must have one of \('unet', 'transformer'\)"):
        read_base_model(tmp_path)


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
        vae_work(shapes.base, (2, *shapes.latents), 1, torch.float32, decodes=True),
        vae_work(shapes.base, (2, 3, 64, 64), 1, torch.float32, decodes=False),
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

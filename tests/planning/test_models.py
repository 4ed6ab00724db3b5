from __future__ import annotations

import json

import pytest
import torch

from diffusers_ext.planning.models import published_names, read_base_model
from examples.digits.check_model import MODEL_DIR

# As the model pages and the sizes of the published files say.
COUNTS = {
    "SD1.5": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "SD2.1": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "SDXL": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "SD3": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656},
    "FLUX.1-dev": {"transformer": 11_901_408_320, "vae": 83_819_683},
    "FLUX.1-schnell": {"transformer": 11_891_178_560},
    "Hunyuan-DiT": {"transformer": 1_516_534_048},
    "CogVideoX-2b": {"transformer": 1_693_783_872},
    "CogVideoX-5b": {"transformer": 5_570_283_072},
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_numbers_of_parameters(name):
    components = read_base_model(name).components
    found = {part: components[part].parameters() for part in COUNTS[name]}
    assert found == COUNTS[name]


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

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.guard import NoiseGuard
from tests.golden_noise.golden_pipelines import FAMILIES, NETWORKS, golden_pipeline
from tests.golden_noise.shared_facts import RESULT

FACTS = {"base_model": "somebody/base", "license": "mit", "trained_on": "900 noise pairs"}
# Classes of three families and of all networks in three pipelines: the code is the same for all.
CASES = {"sd": "npnet", "sdxl": "transformer", "flux": "rnn", "hunyuan_dit": "model", "sd3": "model"}


def assert_same_weights(loaded, pipeline) -> None:
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            weights = loaded.components[name].state_dict()
            for key, value in component.state_dict().items():
                assert torch.equal(weights[key], value), (name, key)


@pytest.mark.parametrize("family", CASES)
def test_pipelines_come_back_from_the_hub_without_remote_code(hub, family):
    pipeline = golden_pipeline(family, name=CASES[family])
    pipeline.push_to_hub("tester/golden", results=[RESULT], **FACTS)
    files = hub.files("tester/golden")
    index = json.loads(files["model_index.json"])
    assert index["noise_model"] == ["diffusers_ext", NETWORKS[CASES[family]][0].__name__]
    card = ModelCard(files["README.md"].decode())
    for text in (
        f'{type(pipeline).__name__}.from_pretrained("tester/golden", dtype=torch.bfloat16)',
        f"from diffusers import {FAMILIES[family].golden.__bases__[1].__name__}",
        f"`{type(pipeline.noise_model).__name__}`",
        "900 noise pairs",
    ):
        assert text in card.text
    assert (card.data.base_model, card.data.license) == ("somebody/base", "mit")
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    loaded = type(pipeline).from_pretrained("tester/golden", dtype=torch.float32)
    assert type(loaded.noise_model) is type(pipeline.noise_model)
    assert_same_weights(loaded, pipeline)
    plain_class = FAMILIES[family].golden.__bases__[1]
    stock = plain_class.from_pretrained("tester/golden", dtype=torch.float32, local_files_only=True)
    assert "noise_model" not in stock.components
    without = type(pipeline).from_pretrained("tester/golden", noise_model=None, local_files_only=True)
    assert without.noise_model is None


def test_saving_may_push(hub, tmp_path):
    pipeline = golden_pipeline("sd")
    address = pipeline.push_to_hub("tester/golden", create_pr=True, private=True, **FACTS)
    assert address.endswith("/discussions/1")
    assert hub.files("tester/golden") == {}
    pipeline.save_pretrained(tmp_path / "golden", push_to_hub=True, revision="half", variant="fp16", **FACTS)
    name = "noise_model/diffusion_pytorch_model.fp16.safetensors"
    assert (tmp_path / "golden" / name).is_file()
    assert name in hub.files("tester/golden", revision="half")
    loaded = type(pipeline).from_pretrained("tester/golden", revision="half", variant="fp16")
    assert loaded.noise_model is not None


def test_a_guard_goes_with_its_network_to_the_hub_and_back(hub):
    pipeline = golden_pipeline("sd")
    network = pipeline.noise_model
    sizes = {name: network.config[name] for name in ("in_channels", "text_embed_dim")}
    network.set_guard(NoiseGuard(**sizes, width=16, num_layers=1, num_heads=2, threshold=0.25))
    pipeline.push_to_hub("tester/guarded", **FACTS)
    assert "noise_model/guard/diffusion_pytorch_model.safetensors" in hub.files("tester/guarded")
    loaded = type(pipeline).from_pretrained("tester/guarded").noise_model
    alone = load_noise_model("tester/guarded", subfolder="noise_model")
    for guard in (loaded.guard, alone.guard):
        assert guard.config.threshold == 0.25
        for name, value in network.guard.state_dict().items():
            assert torch.equal(guard.state_dict()[name], value)

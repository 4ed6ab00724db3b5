from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffusers_ext.golden_noise.networks.base import NETWORK_MODULES, GoldenNoiseNetwork, load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from tests.evaluation.golden_subjects import small_network
from tests.golden_noise.npnet_fixture import nested, official_weights

NETWORKS = (NPNet, GoldenNoiseModel, NoiseSequenceTransformer, NoiseSequenceRNN)


def test_the_class_is_the_one_of_the_config(tmp_path):
    network = small_network()
    network.save_pretrained(tmp_path)
    loaded = load_noise_model(tmp_path)
    assert type(loaded) is GoldenNoiseModel
    assert not loaded.training
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_every_class_is_a_network_of_its_name():
    assert NETWORK_MODULES.keys() == {network.__name__ for network in NETWORKS}
    for network in NETWORKS:
        assert NETWORK_MODULES[network.__name__] == network.__module__
        assert issubclass(network, GoldenNoiseNetwork)


def test_arguments_reach_the_class(tmp_path):
    small_network().save_pretrained(tmp_path / "noise_model")
    loaded = load_noise_model(tmp_path, subfolder="noise_model", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16


def test_other_folders_are_refused(tmp_path):
    UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    ).save_pretrained(tmp_path)
    message = "must hold a golden-noise network, one of .*'NPNet'.*, got 'UNet2DModel' in .*"
    with pytest.raises(ValueError, match=message + "NPNet.from_single_file"):
        load_noise_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="got None in"):
        load_noise_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must hold JSON, got: "):
        load_noise_model(tmp_path)
    for config in ("[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match="config.json must (hold|be nested)"):
            load_noise_model(tmp_path)


def test_a_single_file_of_npnet_is_read_as_what_it_is(tmp_path):
    torch.save({}, tmp_path / "sdxl.pth")
    with pytest.raises((ValueError, OSError)) as error:
        load_noise_model(tmp_path / "sdxl.pth")
    assert "no such folder" not in str(error.value)
    assert "sdxl.pth" in str(error.value)


@pytest.mark.parametrize("name", ["dit.pth", "dit.safetensors"])
def test_published_files_load(tmp_path, name):
    path, weights = tmp_path / name, official_weights("dit")
    torch.save(nested(weights), path) if name.endswith("pth") else save_file(weights, path)
    loaded = load_noise_model(path, variant="Hunyuan-DiT", dtype=torch.bfloat16)
    assert type(loaded) is NPNet
    assert loaded.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="'typo': of a single file it takes `variant` and `dtype`"):
        load_noise_model(path, typo=1)
    with pytest.raises(ValueError, match=rf"{name} must hold weights of NPNet: .*'SDXL'"):
        load_noise_model(path, variant="SDXL")


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone.pth must be a file, got: No such file"):
        load_noise_model(tmp_path / "gone.pth")
    small_network().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be the folder of a saved network, got its file"):
        load_noise_model(tmp_path / "diffusion_pytorch_model.safetensors")

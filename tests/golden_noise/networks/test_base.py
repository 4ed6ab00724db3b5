from __future__ import annotations

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import ModelCard

from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, load_noise_model
from tests.golden_noise.golden_pipelines import NETWORKS
from tests.golden_noise.shared_facts import NETWORK_FACTS, RESULT


def small(name: str, **config):
    network_class, options = NETWORKS[name]
    shared = {"in_channels": 4, "sample_size": 8, "text_embed_dim": 16}
    if name == "npnet":
        shared["text_length"] = 6
    torch.manual_seed(0)
    network = network_class(**{**shared, **options, **config}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def assert_equal(loaded: torch.nn.Module, network: torch.nn.Module) -> None:
    assert type(loaded) is type(network)
    assert not loaded.training
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_back_from_the_hub(hub, name, tmp_path):
    network = small(name)
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    network.push_to_hub("tester/noise", results=[RESULT], settings={"w1": 5.5}, **NETWORK_FACTS)
    assert network.training
    assert all(torch.equal(network.state_dict()[key], value) for key, value in kept.items())
    assert_equal(type(network).from_pretrained("tester/noise"), network)
    assert_equal(load_noise_model("tester/noise", local_files_only=True), network)
    files = hub.files("tester/noise")
    assert files.keys() == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "somebody/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == 0.25
    for text in (
        f'{type(network).__name__}.from_pretrained("tester/noise")',
        "GoldenNoisePipeline",
        "900 noise pairs",
        "| w1 | 5.5 |",
        "latents of 4 x 8 x 8",
    ):
        assert text in card.text


def test_branches_folders_and_privacy(hub, tmp_path):
    first, second = small("model"), small("model", width=48)
    first.push_to_hub("tester/noise", subfolder="small", private=True, **NETWORK_FACTS)
    assert hub.repos["tester/noise"].private
    assert 'from_pretrained("tester/noise", subfolder="small")' in (hub.files("tester/noise")["README.md"].decode())
    second.push_to_hub("tester/noise", revision="wide", commit_message="Wide", **NETWORK_FACTS)
    address = second.push_to_hub("tester/noise", create_pr=True, **NETWORK_FACTS)
    assert address.endswith("/discussions/1")
    assert_equal(load_noise_model("tester/noise", subfolder="small"), first)
    assert_equal(load_noise_model("tester/noise", revision="wide"), second)
    assert_equal(load_noise_model("tester/noise", revision="refs/pr/1"), second)
    message = "must be a folder or Hub name of a golden-noise network, got tester/noise: "
    with pytest.raises(ValueError, match=message + "there is no config.json in it"):
        load_noise_model("tester/noise")
    with pytest.raises(ValueError, match=r"no such repository for this login.* needs `token`"):
        load_noise_model("tester/noise", subfolder="small", token="hf_stranger", cache_dir=tmp_path)


def test_saving_may_push_and_knows_the_folders_name(hub, tmp_path):
    network = small("model")
    network.save_pretrained(tmp_path / "noise", push_to_hub=True, **NETWORK_FACTS)
    assert_equal(load_noise_model(tmp_path / "noise"), network)
    assert_equal(load_noise_model("tester/noise"), network)
    assert "Nothing was measured" in hub.files("tester/noise")["README.md"].decode()


def test_a_missing_fact_stops_before_anything_is_written(hub, tmp_path):
    network = small("model")
    for name, message in (
        ("base_model", "`base_model` must be given for the card, got None. Pass the Hub name"),
        ("trained_on", "`trained_on` must be given for the card"),
        ("license", "`license` must be given, got None, and the card of the base model somebody"),
        ("pipeline", "`pipeline` must be one of .*, got None, and somebody/base has no model_index"),
    ):
        facts = {**NETWORK_FACTS, name: None}
        with pytest.raises(ValueError, match=message):
            network.push_to_hub("tester/noise", **facts)
        with pytest.raises(ValueError, match=message):
            network.save_pretrained(tmp_path / "out", push_to_hub=True, **facts)
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_a_network_of_another_class_is_refused(tmp_path):
    network = small("rnn")
    network.save_pretrained(tmp_path)
    message = "must hold a NPNet, got 'NoiseSequenceRNN' in .*`load_noise_model` loads"
    with pytest.raises(ValueError, match=message):
        NETWORKS["npnet"][0].from_pretrained(tmp_path)
    assert_equal(type(network).from_pretrained(tmp_path), network)


class Scaled(GoldenNoiseNetwork, ModelMixin, ConfigMixin):
    """A user's network."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))


def test_a_network_of_ones_own_is_saved_but_has_no_card(hub, tmp_path):
    Scaled().save_pretrained(tmp_path)
    assert Scaled.from_pretrained(tmp_path).weight.item() == 1
    with pytest.raises(ValueError, match=r"`network` must be one of \['NPNet', .*got a Scaled"):
        Scaled().push_to_hub("tester/noise", **NETWORK_FACTS)
    with pytest.raises(TypeError, match="Scaled must define `golden_noise`"):
        Scaled().golden_noise(None, None)

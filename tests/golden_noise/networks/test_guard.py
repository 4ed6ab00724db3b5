import json
from copy import deepcopy

import pytest
import torch

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.guard import NoiseGuard, choose_threshold, gain_ranks, guard_figures

SIZES = {"in_channels": 4, "text_embed_dim": 12, "width": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def guard() -> NoiseGuard:
    torch.manual_seed(0)
    return NoiseGuard(**SIZES, gain_scale=0.5).eval()


@pytest.fixture
def network() -> GoldenNoiseModel:
    torch.manual_seed(1)
    network = GoldenNoiseModel(patch_size=2, sample_size=8, **SIZES).eval()
    torch.nn.init.normal_(network.head.weight, std=0.2)
    return network


def inputs(size: tuple[int, int] = (8, 8), batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, 5, 12, generator=generator)


def expected(guard: NoiseGuard, network: GoldenNoiseModel, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    bare = deepcopy(network)
    bare.set_guard(None)
    return guard(guard.inputs(noise, bare.refine(noise, text)), text)


@torch.no_grad()
def test_noise_without_an_expected_gain_stays_to_the_bit(network, guard, subtests):
    for size in [(8, 8), (7, 12), (24, 16)]:
        with subtests.test(size=size):
            noise, text = inputs(size)
            plain = network.refine(noise, text)
            gains = expected(guard, network, noise, text)
            guard.register_to_config(threshold=gains.median().item())
            network.set_guard(guard)
            guarded = network.refine(noise, text)
            stays = gains <= gains.median()
            assert 0 < stays.sum() < len(noise)
            assert torch.equal(guarded[stays], noise[stays])
            assert torch.equal(guarded[~stays], plain[~stays])
            network.set_guard(None)
            assert torch.equal(network.refine(noise, text), plain)


def test_a_guard_is_no_part_of_the_weights(network, guard):
    names = set(network.state_dict())
    network.set_guard(guard)
    assert set(network.state_dict()) == names
    assert network.guard is guard
    assert len(list(network.parameters())) == len(names)


def test_it_is_saved_and_loaded_with_its_network(network, guard, tmp_path):
    noise, text = inputs()
    guard.register_to_config(threshold=expected(guard, network, noise, text).median().item())
    network.set_guard(guard)
    network.save_pretrained(tmp_path / "own", variant="fp16")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["_noise_guard"] == "guard"
    loaded = load_noise_model(tmp_path / "own", variant="fp16")
    assert loaded.guard.config.threshold == guard.config.threshold
    assert torch.equal(loaded.refine(noise, text), network.refine(noise, text))
    # In half precision the network changes noise a little otherwise, and the guard is float32 still.
    half = load_noise_model(tmp_path / "own", variant="fp16", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.guard.parameters()} == {torch.float32}
    assert half.refine(noise, text).isfinite().all()
    loaded.set_guard(None)
    loaded.save_pretrained(tmp_path / "without")
    assert load_noise_model(tmp_path / "without").guard is None


def test_a_folder_that_lacks_its_guard_is_refused(network, guard, tmp_path):
    network.set_guard(guard)
    network.save_pretrained(tmp_path)
    (tmp_path / "guard" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"guard: there is no config\.json in it"):
        load_noise_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_noise_guard": "../elsewhere"}))
    with pytest.raises(ValueError, match="`_noise_guard` must be 'guard' or null"):
        load_noise_model(tmp_path)


def test_guards_of_other_networks_and_other_things_are_refused(network):
    with pytest.raises(ValueError, match="`guard` must have `text_embed_dim` 12 like its network, got 10"):
        network.set_guard(NoiseGuard(**{**SIZES, "text_embed_dim": 10}))
    with pytest.raises(TypeError, match="`guard` must be a NoiseGuard or None, got a Linear"):
        network.set_guard(torch.nn.Linear(1, 1))
    assert network.guard is None


def test_a_network_is_no_guard(network, tmp_path):
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a NoiseGuard, got 'GoldenNoiseModel'"):
        NoiseGuard.from_pretrained(tmp_path)


GAINS = torch.tensor([0.5, -0.1, 0.3, -0.2, 0.0, 0.1])
EXPECTED = torch.tensor([0.9, 0.1, 0.8, 0.4, 0.2, 0.3])


def test_the_threshold_changes_the_fewest_noises_that_keep_the_gain():
    # In the order of what is expected the gains add up to 0.5, 0.8, 0.6, 0.7, 0.7, 0.6.
    threshold = choose_threshold(GAINS, EXPECTED, 0.05)
    assert 0.4 < threshold < 0.8
    assert 0.8 < choose_threshold(GAINS, EXPECTED, 0.5) < 0.9
    with pytest.raises(ValueError, match="`gain_lost` must be in"):
        choose_threshold(GAINS, EXPECTED, 1.0)
    assert choose_threshold(-GAINS, EXPECTED, 0.1) == pytest.approx(0.9)
    assert guard_figures(-GAINS, EXPECTED, 0.9).share_changed == 0


def test_the_rank_of_a_gain_is_the_share_of_smaller_ones():
    found = gain_ranks(torch.tensor([-1.0, 0.0, 0.05, 0.5, 9.0]), GAINS)
    assert found.tolist() == pytest.approx([0, 2.5 / 6, 3 / 6, 5.5 / 6, 1])


def test_figures_of_a_guard():
    figures = guard_figures(GAINS, EXPECTED, 0.35)  # changes 0.5, 0.3 and -0.2
    assert figures.share_changed == pytest.approx(3 / 6)
    assert figures.gain_kept == pytest.approx(0.6 / 0.6)
    assert figures.losses == pytest.approx(2 / 6)
    assert figures.losses_left == pytest.approx(1 / 6)
    assert figures.losses_avoided == pytest.approx(1 / 2)
    assert figures.win_rate == pytest.approx(3.5 / 6)
    assert figures.win_rate_changed == pytest.approx(2 / 3)
    assert guard_figures(GAINS, EXPECTED, 1.0).share_changed == 0

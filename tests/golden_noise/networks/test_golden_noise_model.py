import json

import pytest
import torch
from safetensors.torch import save

from diffusers_ext.core.artifacts import sealed
from diffusers_ext.core.tensor_files import CONFIG_KEY, config_digest, read_tensors
from diffusers_ext.core.text_files import read_json
from diffusers_ext.families import families_of
from diffusers_ext.golden_noise.low_frequencies import cosine_waves
from diffusers_ext.golden_noise.networks.base import fitted_structure
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel, from_patches, to_patches
from diffusers_ext.planning.models import published_model


@pytest.fixture
def model() -> GoldenNoiseModel:
    torch.manual_seed(0)
    return GoldenNoiseModel(4, 2, 8, text_embed_dim=12, width=16, num_layers=2, num_heads=2)


def trained(model: GoldenNoiseModel) -> GoldenNoiseModel:
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model.eval()


def inputs(batch: int = 2, channels: int = 4, size: tuple = (8, 8), tokens: int = 5) -> tuple:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, channels, *size, generator=generator)
    return noise, torch.randn(batch, tokens, 12, generator=generator)


def test_an_untrained_network_is_the_identity_to_the_bit(model):
    noise, text = inputs()
    assert torch.equal(model(noise, text), noise)
    assert torch.equal(model.refine(noise, text), noise)


def test_it_is_so_in_half_precision_too(model):
    noise, text = inputs()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(model.to(dtype).refine(noise, text), noise)


def test_every_parameter_is_reached_by_the_gradient_after_the_head_moved(model):
    noise, text = inputs()
    trained(model)(noise, text).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_any_size_aspect_and_prompt_length(model, subtests):
    for size in [(8, 8), (16, 8), (7, 9), (3, 12), (32, 32)]:
        for tokens in [1, 5, 200]:
            with subtests.test(size=size, tokens=tokens):
                noise, text = inputs(size=size, tokens=tokens)
                golden = trained(model).refine(noise, text)
                assert golden.shape == noise.shape
                assert golden.isfinite().all()
                assert not torch.equal(golden, noise)
                torch.testing.assert_close(golden.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))


def test_sixteen_channels():
    model = GoldenNoiseModel(16, 2, 8, text_embed_dim=12, width=64, num_layers=1, num_heads=2)
    noise, text = inputs(channels=16)
    assert trained(model)(noise, text).shape == noise.shape


def test_the_prompt_matters(model):
    noise, text = inputs()
    changed = trained(model)(noise, text.flip(0))
    assert not torch.allclose(changed, model(noise, text), atol=1e-3)


def test_masked_tokens_do_not_matter(model):
    noise, text = inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    other = text.clone()
    other[0, 2:], other[1, 4:] = 7.0, -3.0
    trained(model)
    torch.testing.assert_close(model(noise, text, mask), model(noise, other, mask))
    shorter = model(noise[:1], text[:1, :2])
    torch.testing.assert_close(model(noise, text, mask)[:1], shorter, atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(model):
    noise, text = inputs(batch=3)
    together = trained(model).refine(noise, text)
    alone = torch.cat([model.refine(noise[i : i + 1], text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_scale_zero_is_the_noise_and_the_mode_comes_back(model):
    noise, text = inputs()
    trained(model).train()
    assert torch.equal(model.refine(noise, text, scale=0), noise)
    half = model.refine(noise, text, scale=0.5)
    assert all(module.training for module in model.modules())
    full = model.refine(noise, text)
    assert 0 < (half - noise).norm() < (full - noise).norm()


def test_the_mode_comes_back_after_an_exception(model):
    noise, text = inputs()
    model.train()
    with pytest.raises(ValueError, match="must be 12 wide"):
        model.refine(noise, text[..., :6])
    assert all(module.training for module in model.modules())


def test_patches_come_back():
    latents = torch.randn(2, 3, 6, 8)
    patches, grid = to_patches(latents, 2)
    assert patches.shape == (2, 12, 12)
    assert grid == (3, 4)
    assert torch.equal(from_patches(patches, grid, 2), latents)


def test_saved_and_loaded(model, tmp_path):
    noise, text = inputs()
    trained(model).save_pretrained(tmp_path)
    loaded = GoldenNoiseModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(noise, text), model(noise, text))
    assert loaded.config.patch_size == 2


PUBLISHED = [(family, base) for family in families_of("golden_noise") for base in family.published]


@pytest.mark.parametrize(("family", "base"), PUBLISHED, ids=[base.short_name for _, base in PUBLISHED])
def test_every_published_size_has_at_most_ten_million_parameters(family, base):
    sizes = family.network_sizes(published_model(base.short_name).component(family.denoiser).whole_config())
    fitted = fitted_structure("golden_noise_model", sizes.in_channels, sizes.text_embed_dim)
    with torch.device("meta"):
        model = GoldenNoiseModel(in_channels=sizes.in_channels, text_embed_dim=sizes.text_embed_dim, **fitted)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 10e6
    assert ("text_projection_dim" in fitted) == (sizes.text_embed_dim > 4096)


def test_wide_text_is_projected_first(tmp_path):
    torch.manual_seed(0)
    model = GoldenNoiseModel(4, 2, 8, text_embed_dim=24, width=16, num_layers=1, num_heads=2, text_projection_dim=3)
    shapes = [tuple(weight.shape) for weight in model.text.project.parameters()]
    assert shapes == [(3, 24), (16, 3), (16,)]
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    assert torch.equal(model(noise, text), noise)
    trained(model).save_pretrained(tmp_path)
    loaded = GoldenNoiseModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(noise, text), model(noise, text))
    assert not torch.equal(loaded(noise, text), model(noise, text.flip(2)))
    with pytest.raises(ValueError, match="`text_projection_dim` must be at least 1 or None, got 0"):
        GoldenNoiseModel(text_projection_dim=0)


def test_networks_saved_before_there_was_a_projection_load(model, tmp_path):
    trained(model).save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    config = json.loads(path.read_text())
    assert config.pop("text_projection_dim") is None
    path.write_text(json.dumps(config))
    digest = config_digest({name: value for name, value in config.items() if not name.startswith("_")})
    weights.write_bytes(sealed(read_tensors(weights)[0], {"format": "pt", CONFIG_KEY: digest}))
    noise, text = inputs()
    assert torch.equal(GoldenNoiseModel.from_pretrained(tmp_path)(noise, text), model(noise, text))


def test_bad_input(model):
    noise, text = inputs()
    with pytest.raises(ValueError, match="`noise` must have the 4 channels"):
        model(torch.randn(2, 3, 8, 8), text)
    with pytest.raises(ValueError, match="`prompt_embeds` must be 12 wide"):
        model(noise, text[..., :8])
    with pytest.raises(ValueError, match=r"`prompt_embeds` must be \(2, tokens, dim\)"):
        model(noise, text[:1])
    with pytest.raises(ValueError, match=r"`noise` must be \(batch, channels"):
        model(noise[0], text)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(2, 5\)"):
        model(noise, text, torch.ones(2, 4))
    with pytest.raises(ValueError, match="`width` must be at least the 64 numbers"):
        GoldenNoiseModel(16, 2, 8, width=32)


@pytest.fixture
def banded() -> GoldenNoiseModel:
    torch.manual_seed(0)
    return GoldenNoiseModel(4, 2, 8, text_embed_dim=12, width=16, num_layers=2, num_heads=2, bands=3)


def test_an_untrained_network_of_low_bands_is_the_identity_to_the_bit(banded):
    noise, text = inputs(size=(8, 12))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(banded.to(dtype).refine(noise, text), noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_bands_leave_the_other_frequencies_at_any_size(banded, subtests, dtype):
    network = trained(banded).to(dtype)
    for size in [(8, 8), (7, 13), (2, 12), (40, 8)]:
        with subtests.test(size=size):
            noise, text = inputs(size=size)
            rows, columns = (cosine_waves(side, side) for side in size)
            change = rows @ (network.refine(noise, text).double() - noise.double()) @ columns.T
            assert change[..., :3, :3].abs().max() > 0.05
            change[..., :3, :3] = 0
            # Rounding of the sum in float32, also where the network computes in half precision.
            assert change.abs().max() < 2e-6


def test_low_bands_see_nothing_but_the_low_bands(banded):
    noise, text = inputs(size=(16, 16))
    rows = cosine_waves(16, 16).float()
    high = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    high[..., :3, :3] = 0
    other = noise + rows.T @ high @ rows
    network = trained(banded)
    changes = [network(x, text) - x for x in (noise, other)]
    torch.testing.assert_close(*changes, atol=1e-5, rtol=1e-5)


def test_a_network_of_low_bands_is_trained_saved_and_loaded(banded, tmp_path):
    noise, text = inputs()
    network = trained(banded)
    network(noise, text).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.save_pretrained(tmp_path)
    loaded = GoldenNoiseModel.from_pretrained(tmp_path)
    assert loaded.config.bands == 3
    assert torch.equal(loaded.refine(noise, text), network.refine(noise, text))


def test_a_network_saved_before_bands_loads_as_it_was(model, tmp_path):
    noise, text = inputs()
    trained(model).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights, _ = read_tensors(path)
    config = {name: value for name, value in read_json(tmp_path / "config.json").items() if name != "bands"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path.write_bytes(save({name: tensor.clone() for name, tensor in weights.items()}))
    loaded = GoldenNoiseModel.from_pretrained(tmp_path)
    assert loaded.config.bands is None
    assert torch.equal(loaded.refine(noise, text), model.refine(noise, text))


@pytest.mark.parametrize("bands", [0, -1, 2.0, True])
def test_bad_bands_are_refused(bands):
    with pytest.raises(ValueError, match="`bands` must be a number from 1 or None"):
        GoldenNoiseModel(4, 2, 8, text_embed_dim=12, width=16, bands=bands)

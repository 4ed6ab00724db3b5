import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import SwinConfig

from diffusers_ext.golden_noise.networks.npnet_branches import (
    SingularParts,
    SVDBranch,
    linear,
    matrix_to_noise,
    noise_to_matrix,
    singular_parts,
    swin_features,
)
from diffusers_ext.golden_noise.networks.swin import swin_model
from tests.golden_noise.npnet_fixture import inputs, official_weights, outputs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("depths", "heads", "window"), [((2, 2), (2, 4), 4), ((1,), (2,), 8), ((3, 2, 1), (1, 2, 2), 2)]
)
def test_features_are_those_of_transformers(batch, depths, heads, window):
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=list(depths), num_heads=list(heads), window_size=window
    )
    model = swin_model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    pixels = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    torch.testing.assert_close(swin_features(model, pixels), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_is_the_layer(bias):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 5, 24)
    torch.testing.assert_close(linear(layer, x), layer(x), rtol=0, atol=1e-6)
    halved = layer.to(torch.bfloat16)
    assert torch.equal(linear(halved, x.bfloat16()), halved(x.bfloat16()))


def test_linear_keeps_gradients_and_runs_wrapped_layers():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is not None

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    wrapped = Doubled(4, 4)
    with torch.no_grad():
        assert torch.equal(linear(wrapped, x), wrapped(x))


@torch.no_grad()
def test_hooks_and_replaced_forwards_are_called():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = linear(layer, x)
    handle.remove()
    assert torch.equal(seen[0], expected)
    layer.forward = lambda x: 3 * x
    assert torch.equal(linear(layer, x), 3 * x)


def test_weights_that_only_hooks_bring_are_not_touched_before():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    model = swin_model(config).eval()
    pixels = torch.randn(1, 3, 16, 16)
    expected = swin_features(model, pixels)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    torch.testing.assert_close(swin_features(model, pixels), expected)


@pytest.fixture(scope="module")
def branch():
    """The branch with the reference's large weights in the networks of the vectors."""
    branch = SVDBranch(4, 128).eval()
    state = {}
    names = {"mlp1.": "left_mlp.", "mlp2.": "right_mlp.", "mlp3.0.": "value_mlp.", "mlp4.": "output_mlp."}
    for name, value in official_weights("svd_sensitive").items():
        name = name.removeprefix("unet_svd.")
        for official, own in names.items():
            name = name.replace(official, own)
        if not name.startswith("bn."):
            state[name] = value
    branch.load_state_dict(state)
    return branch


def with_signs_of(parts, reference):
    rows = reference["sign_row"].long()[:, None]
    signs = parts.u.gather(1, rows).sign() * reference["sign_value"][:, None]
    return SingularParts(parts.u * signs, parts.s, parts.vh * signs.mT)


@pytest.mark.parametrize("signs", ["canonical", "backend"])
@torch.no_grad()
def test_the_vectors_networks_are_the_official_ones(branch, signs):
    noise, expected = inputs("sdxl")[0], outputs("svd_sensitive")
    parts = with_signs_of(singular_parts(noise_to_matrix(noise), signs), expected)
    torch.testing.assert_close(parts.s, expected["singular_values"], rtol=0, atol=2e-4)
    changes = branch.value_changes(parts)
    torch.testing.assert_close(changes, expected["delta_singular_values"], rtol=0, atol=2e-3)
    matrix = parts.u @ torch.diag_embed(parts.s + changes) @ parts.vh
    found = matrix_to_noise(matrix, 4)[0]
    torch.testing.assert_close(found, expected["svd_branch_item0"], rtol=0, atol=2e-4)


@torch.no_grad()
def test_the_branch_rebuilds_from_changed_values(branch):
    noise = inputs("sdxl")[0]
    parts = singular_parts(noise_to_matrix(noise))
    s = parts.s + branch.value_changes(parts)
    expected = matrix_to_noise(parts.u @ torch.diag_embed(s) @ parts.vh, 4)
    torch.testing.assert_close(branch(noise), expected, rtol=0, atol=1e-4)


def test_channels_are_tiles():
    noise = torch.arange(2 * 4 * 3 * 3.0).view(2, 4, 3, 3)
    matrix = noise_to_matrix(noise)
    for tile_row in range(2):
        for tile_column in range(2):
            tile = matrix[:, 3 * tile_row :, 3 * tile_column :][:, :3, :3]
            assert torch.equal(tile, noise[:, 2 * tile_row + tile_column])
    assert torch.equal(matrix_to_noise(matrix, 4), noise)


def test_canonical_signs_are_the_same_for_any_backend():
    matrix = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = singular_parts(matrix)
    largest = parts.u.gather(1, parts.u.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    u, s, vh = torch.linalg.svd(matrix.double())
    sign = u.gather(1, u.abs().argmax(1, keepdim=True)).sign()
    for found, expected in zip(parts, (u * sign, s, vh * sign.mT)):
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 31])
def test_matrices_without_full_rank(rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 32, rank, generator=generator) @ torch.randn(2, rank, 32, generator=generator)
    parts = singular_parts(matrix)
    rebuilt = parts.u @ torch.diag_embed(parts.s) @ parts.vh
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.u.mT @ parts.u, torch.eye(32).expand(2, -1, -1))


def test_no_gradient_goes_through_the_decomposition():
    noise = torch.randn(1, 4, 8, 8, requires_grad=True)
    branch = SVDBranch(4, 8, hidden_dim=8, output_dim=16, num_heads=2)
    branch(noise).sum().backward()
    assert torch.equal(noise.grad, torch.ones_like(noise))
    assert all(p.grad is not None for p in branch.parameters())


def test_pooled_attention_is_the_mean_of_attention():
    attention = SVDBranch(4, 8, num_heads=2).attention
    tokens = torch.randn(2, 16, 16)
    q, k, v = attention.qkv(tokens).view(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = attention.proj(mixed.transpose(1, 2).flatten(2)).mean(1)
    torch.testing.assert_close(attention(tokens), expected)

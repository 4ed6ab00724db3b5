import pytest
import torch

from diffusers_ext.golden_noise.networks.npnet_branches import (
    SingularParts,
    SVDBranch,
    matrix_to_noise,
    noise_to_matrix,
    singular_parts,
)
from tests.golden_noise.npnet_fixture import inputs, official_weights, outputs


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

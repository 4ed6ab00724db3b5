from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.sequence_rnn import (
    ResidualBlock,
    ResidualStage,
    UpsampleTo,
    group_norm,
)


@pytest.mark.parametrize(("channels", "groups"), [(48, 16), (8, 8), (12, 4), (7, 1), (64, 16)])
def test_groups_divide_the_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_a_block_adds_to_its_input():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, 6)
    features, condition = torch.randn(2, 8, 5, 5), torch.randn(2, 6)
    with torch.no_grad():
        block.conv_out.weight.zero_()
        block.conv_out.bias.zero_()
    assert torch.equal(block(features, condition), features)


def test_the_condition_acts_only_once_film_is_trained():
    torch.manual_seed(0)
    block = ResidualBlock(8, 12, 6)
    features, condition = torch.randn(2, 8, 5, 5), torch.randn(2, 6)
    start = block(features, condition)
    assert start.shape == (2, 12, 5, 5)
    assert torch.equal(start, block(features, -condition))
    with torch.no_grad():
        block.film.gamma_beta.weight.normal_()
    assert not torch.equal(block(features, condition), block(features, -condition))


def test_a_stage_has_as_many_blocks_as_asked_for():
    stage = ResidualStage(8, 12, 3, 6)
    assert len(stage.blocks) == 3
    assert stage(torch.randn(2, 8, 4, 4), torch.randn(2, 6)).shape == (2, 12, 4, 4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9)])
def test_upsampling_undoes_a_stride_at_any_size(size):
    features = torch.randn(2, 4, *size)
    small = torch.nn.Conv2d(4, 4, 3, stride=2, padding=1)(features)
    assert UpsampleTo(4, 6)(small, features.shape[-2:]).shape == (2, 6, *size)

from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.sequence_rnn import FiLM, ResidualBlock, ResidualStage, UpsampleTo, group_norm
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from tests.golden_noise.tiny_sequences import STEPS, TEXT_DIM, random_network, sequence_and_text, untrained


def test_generation_passes_each_frame_once():
    network = random_network("rnn")
    noise, text = sequence_and_text()
    seen, read = [], []
    network.conv_in.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    network.text_reader.register_forward_hook(lambda *_: read.append(1))
    network.generate_sequence(noise[:, 0], text, STEPS)
    assert seen == [2] * STEPS
    assert len(read) == 1


def test_a_sequence_continues_from_the_state_of_the_gru():
    network = random_network("rnn", num_steps=5)
    noise, text = sequence_and_text(steps=5)
    read = network.read_text(text, None)
    whole, _ = network.predict_frames(noise, read, None)
    first, memory = network.predict_frames(noise[:, :2], read, None)
    assert memory.shape == (2, 2 * 16, 12)
    second, _ = network.predict_frames(noise[:, 2:], read, memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    forgetful, _ = network.predict_frames(noise[:, 2:], read, None)
    assert (forgetful - second).abs().max() > 1e-4


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (13, 5)])
def test_any_size_at_any_depth(stages, size):
    network = random_network("rnn", cnn_num_blocks=[1] * stages)
    noise, text = sequence_and_text(size=size)
    assert network(noise, text).mean.shape == noise.shape


def test_fine_detail_does_not_pass_the_gru():
    network = random_network("rnn")
    noise, text = sequence_and_text()
    before = network(noise, text).mean
    with torch.no_grad():
        network.project_out.weight.zero_()
        network.project_out.bias.zero_()
    after = network(noise, text).mean
    assert not torch.equal(before, after)
    # A change that the coarse places average out still comes through.
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    change = network(noise + checkers, text).mean - after - checkers
    assert change.abs().max() > 1e-3


def test_the_gru_reads_the_text():
    network = random_network("rnn")
    noise, text = sequence_and_text()
    given = []
    network.gru.register_forward_hook(lambda _, args, out: given.append(args[0][..., 16:]))
    network(noise, text)
    network(noise, text.flip(0))
    assert given[0].shape == (2 * 16, STEPS, 16)
    assert (given[0] - given[1]).abs().max() > 1e-3
    assert torch.equal(given[0][0, 0], given[0][15, STEPS - 1])


def test_film_starts_from_unchanged_features():
    network = untrained("rnn")
    film = network.decoder[0].blocks[0].film
    features = torch.randn(2, 8, 4, 4)
    assert torch.equal(film(features, torch.randn(2, 16)), features)


def test_pooled_text():
    network = random_network("rnn", pooled_text=True)
    noise, text = sequence_and_text()
    pooled = text[:, 0]
    generated = network.generate_sequence(noise[:, 0], pooled, STEPS)
    golden = network.golden_noise(noise[:, 0], text, pooled_prompt_embeds=pooled)
    assert torch.equal(golden, generated[:, -1])
    refined = network.refine(noise[:, 0], torch.ones(2, 7, 99), pooled_prompt_embeds=pooled)
    torch.testing.assert_close(refined, match_spectrum(golden, noise[:, 0]))
    mask = torch.ones(2, 7)
    masked = network.refine(noise[:, 0], torch.ones(2, 7, 99), attention_mask=mask, pooled_prompt_embeds=pooled)
    assert torch.equal(masked, refined)
    with pytest.raises(ValueError, match="`pooled_prompt_embeds` must be given to a network with"):
        network.refine(noise[:, 0], text)
    with pytest.raises(ValueError, match=r"`text_embed` must be \(batch, dim\) without"):
        network(noise, text)
    with pytest.raises(ValueError, match=r"`text_embed` must be \(batch, dim\) without"):
        network(noise, pooled, torch.ones(2, 1))
    with pytest.raises(ValueError, match=f"`prompt_embeds` must be {TEXT_DIM} wide .*, got 5"):
        network(noise, pooled[:, :5])


def test_one_vector_a_prompt_needs_pooled_text():
    noise, text = sequence_and_text()
    with pytest.raises(ValueError, match=r"`prompt_embeds` must be \(2, tokens, dim\)"):
        untrained("rnn")(noise, text[:, 0])


def test_the_change_can_be_learnt():
    torch.manual_seed(0)
    network = untrained("rnn").train()
    noise, text = sequence_and_text(8, steps=1)
    target = noise + 0.5 * text.mean((1, 2))[:, None, None, None, None] + noise.flip(-1) * 0.3
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(50):
        loss = (network(noise, text).mean - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * (noise - target).square().mean()


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match=r"`cnn_num_blocks` must give each stage .*, got \(\)\."):
        untrained("rnn", cnn_num_blocks=())
    with pytest.raises(ValueError, match=r"`cnn_num_blocks` must .*, got \(1, 0\)\."):
        untrained("rnn", cnn_num_blocks=(1, 0))
    with pytest.raises(ValueError, match=r"`num_heads` must divide the width 16 .*, got 5\."):
        untrained("rnn", num_attention_heads=5)


def test_it_starts_as_the_identity():
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(FiLM(6, 3)(features, torch.randn(2, 6)), features)


def test_it_scales_and_shifts_each_channel():
    film = FiLM(1, 2)
    with torch.no_grad():
        film.gamma_beta.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    features, condition = torch.randn(2, 2, 3, 3), torch.tensor([[1.0], [-0.5]])
    found = film(features, condition)
    torch.testing.assert_close(found[0, 0], 2 * features[0, 0] + 3)
    torch.testing.assert_close(found[0, 1], 3 * features[0, 1] + 4)
    torch.testing.assert_close(found[1, 1], 0 * features[1, 1] - 2)


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

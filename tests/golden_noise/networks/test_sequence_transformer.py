from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.golden_noise_model import to_patches
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer, frame_causal_mask
from diffusers_ext.golden_noise.noise_statistics import match_energy
from tests.golden_noise.tiny_sequences import STEPS, random_network, sequence_and_text, untrained


def test_the_mask_is_causal_over_frames_and_open_within():
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1],
        ]
    )
    assert torch.equal(frame_causal_mask(3, 2), expected.bool())


def test_the_head_reads_the_patch_itself():
    network = untrained("transformer", patch_size=4, d_model=8)
    patch_dim = 4 * 4 * 4
    with torch.no_grad():
        # Wider than a token, yet the head can copy or negate a whole patch.
        network.head.weight[:, -patch_dim:] = -torch.eye(patch_dim)
    noise, text = sequence_and_text()
    assert torch.equal(network(noise, text).mean, torch.zeros_like(noise))


def test_sides_that_the_patch_does_not_divide_are_padded():
    network = random_network("transformer", patch_size=4)
    noise, text = sequence_and_text(size=(7, 6))
    padded = torch.nn.functional.pad(noise, (0, 2, 0, 1))
    expected = network(padded, text).mean[..., :7, :6]
    torch.testing.assert_close(network(noise, text).mean, expected)


def test_generation_passes_each_frame_once():
    network = random_network("transformer")
    noise, text = sequence_and_text()
    seen, read = [], []
    network.blocks[0].register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    network.text_reader.register_forward_hook(lambda *_: read.append(1))
    network.generate_sequence(noise[:, 0], text, STEPS)
    assert seen == [16] * STEPS
    assert len(read) == 1


def test_a_sequence_continues_from_memory_by_several_frames():
    network = random_network("transformer", num_steps=5)
    noise, text = sequence_and_text(steps=5)
    read = network.read_text(text, None)
    whole, _ = network.predict_frames(noise, read, None)
    first, memory = network.predict_frames(noise[:, :2], read, None)
    second, memory = network.predict_frames(noise[:, 2:], read, memory)
    assert memory.num_frames == 5
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_frame_and_patch_have_positions():
    network = random_network("transformer")
    noise, text = sequence_and_text(1, steps=1)
    flat = torch.ones_like(noise).expand(-1, STEPS, -1, -1, -1)
    change = network(flat, text).mean[0] - 1
    patches, _ = to_patches(change, 2)
    assert (patches[:, 0] - patches[:, 1]).abs().max() > 1e-3
    assert (patches[0] - patches[1]).abs().max() > 1e-3


def test_two_states_can_be_learnt():
    torch.manual_seed(0)
    network = untrained("transformer").train()
    noise, text = sequence_and_text(8, steps=1)
    # The target depends on the prompt and on the whole layout.
    target = noise + 0.5 * text.mean((1, 2))[:, None, None, None, None] + noise.flip(-1) * 0.3
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(80):
        loss = (network(noise, text).mean - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * (noise - target).square().mean()
    generated = network.generate_sequence(noise[:, 0], text, 1)
    wanted = match_energy(target[:, 0], noise[:, 0])
    assert (generated[:, 0] - wanted).square().mean() < (noise - target).square().mean() * 0.3


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match=r"`patch_size` must be at least 1, got 0\."):
        NoiseSequenceTransformer(patch_size=0)
    with pytest.raises(ValueError, match=r"`d_model` must be a multiple of 4, got 30\."):
        NoiseSequenceTransformer(d_model=30)
    with pytest.raises(ValueError, match=r"`num_heads` must divide the width 16 .*, got 3\."):
        untrained("transformer", nhead=3)

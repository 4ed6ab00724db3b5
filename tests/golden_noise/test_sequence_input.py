from __future__ import annotations

import pytest
import torch

from tests.golden_noise.tiny_sequences import NETWORKS, STEPS, sequence_and_text, untrained

both = pytest.mark.parametrize("name", list(NETWORKS))


@both
@pytest.mark.parametrize("steps", [0, -1, STEPS + 1])
def test_other_numbers_of_steps_are_refused(name, steps):
    network = untrained(name)
    noise, text = sequence_and_text(steps=1)
    message = f"`num_steps` must be 1 to {STEPS}, the steps that the network was made for, got"
    with pytest.raises(ValueError, match=message):
        network.generate_sequence(noise[:, 0], text, steps)
    with pytest.raises(ValueError, match=message):
        network(noise.expand(-1, max(steps, 0) or STEPS + 2, -1, -1, -1), text)


@both
def test_input_that_does_not_fit_is_refused(name):
    network = untrained(name)
    noise, text = sequence_and_text()
    with pytest.raises(ValueError, match=r"`prompt_embeds` must be 12 wide .*, got 7\."):
        network(noise, text[..., :7])
    with pytest.raises(ValueError, match=r"`noise` must have the 4 channels .*, got 3\."):
        network(noise[:, :, :3], text)
    with pytest.raises(ValueError, match=r"`noise_sequence` must be \(batch, steps, channels"):
        network(noise[:, 0], text)
    with pytest.raises(ValueError, match=r"`noise` must be \(batch, channels, height, width\)"):
        network.generate_sequence(noise, text, STEPS)
    with pytest.raises(ValueError, match=r"`prompt_embeds` must be \(2, tokens, dim\)"):
        network(noise, text[:1])
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(2, 5\)"):
        network(noise, text, torch.ones(2, 4))
    with pytest.raises(ValueError, match="`generator` must be None for a network without"):
        network.generate_sequence(noise[:, 0], text, STEPS, torch.Generator())
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        untrained(name, num_steps=0)

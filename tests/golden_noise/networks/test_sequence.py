from __future__ import annotations

import pytest
import torch

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.noise_statistics import match_energy
from tests.golden_noise.tiny_sequences import NETWORKS, STEPS, TEXT_DIM, random_network, sequence_and_text, untrained

both = pytest.mark.parametrize("name", list(NETWORKS))
# As in the command lines of the design that both names come from.
PUBLISHED = {
    "transformer": {
        "patch_size": 16,
        "d_model": 768,
        "nhead": 12,
        "num_encoder_layers": 4,
        "num_decoder_layers": 4,
        "predict_variance": True,
    },
    "rnn": {"text_embed_dim": 1280, "pooled_text": True, "gru_hidden_size": 1024, "predict_variance": True},
}
SIZES = [(8, 8), (6, 10), (7, 5), (16, 8)]


@both
@pytest.mark.parametrize("predict_variance", [False, True])
def test_an_untrained_network_is_the_identity_to_the_bit(name, predict_variance):
    network = untrained(name, predict_variance=predict_variance)
    noise, text = sequence_and_text()
    prediction = network(noise, text)
    assert torch.equal(prediction.mean, noise)
    assert (prediction.logvar is not None) == predict_variance
    generated = network.generate_sequence(noise[:, 0], text, STEPS)
    assert torch.equal(generated, noise[:, :1].expand_as(generated))
    assert torch.equal(network.refine(noise[:, 0], text), noise[:, 0])


@both
def test_without_residual_the_next_state_itself_is_predicted(name):
    network = untrained(name, predict_residual=False)
    noise, text = sequence_and_text()
    output, _ = network.predict_frames(noise, network.read_text(text, None), None)
    assert torch.equal(network(noise, text).mean, output)
    assert output.std() > 0.01
    generated = network.generate_sequence(noise[:, 0], text, STEPS)
    torch.testing.assert_close(energy(generated), energy(noise[:, :1]).expand(-1, STEPS))


def energy(sequence: torch.Tensor) -> torch.Tensor:
    return sequence.square().mean((2, 3, 4))


@both
@pytest.mark.parametrize("size", SIZES)
def test_no_state_sees_later_ones_and_every_state_sees_all_earlier_ones(name, size):
    network = random_network(name, sample_size=max(size))
    noise, text = sequence_and_text(1, size=size)
    noise.requires_grad_()
    mean = network(noise, text).mean
    assert mean.shape == noise.shape
    for step in range(STEPS):
        gradient = torch.autograd.grad(mean[:, step, 0].sum(), noise, retain_graph=True)[0]
        assert not gradient[:, step + 1 :].any()
        assert gradient[:, : step + 1].flatten(2).any(2).all()


@both
def test_all_places_of_a_state_see_each_other(name):
    network = random_network(name)
    noise, text = sequence_and_text(1)
    noise.requires_grad_()
    mean = network(noise, text).mean[0, 1]
    for row, column in ((0, 0), (0, 7), (7, 3)):
        gradient = torch.autograd.grad(mean[:, row, column].sum(), noise, retain_graph=True)[0]
        assert gradient[0, 1].any(0).all()


@both
@pytest.mark.parametrize("size", SIZES)
def test_generation_equals_teacher_forcing_on_its_own_states(name, size):
    network = random_network(name)
    noise, text = sequence_and_text(size=size)
    start = noise[:, 0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    generated = network.generate_sequence(start, text, STEPS, attention_mask=mask)
    sources = torch.cat([start[:, None], generated[:, :-1]], 1)
    with torch.no_grad():
        mean = network(sources, text, mask).mean
    expected = match_energy(mean.flatten(0, 1), sources.flatten(0, 1)).unflatten(0, (-1, STEPS))
    torch.testing.assert_close(generated, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(energy(generated), energy(start[:, None]).expand(-1, STEPS))
    change = (generated - sources).std((0, 2, 3, 4))
    assert (change > 0.01).all()


@both
def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(name):
    network = random_network(name)
    noise, text = sequence_and_text()
    long = network.generate_sequence(noise[:, 0], text, STEPS)
    short = network.generate_sequence(noise[:, 0], text, 2)
    assert torch.equal(short, long[:, :2])
    assert torch.equal(network.golden_noise(noise[:, 0], text), long[:, -1])


@both
def test_generation_is_deterministic_and_restores_the_mode(name):
    network = random_network(name, dropout=0.5, predict_variance=True)
    noise, text = sequence_and_text()
    expected = network.generate_sequence(noise[:, 0], text, STEPS)
    network.train()
    frozen = next(module for module in network.modules() if isinstance(module, torch.nn.LayerNorm))
    frozen.eval()
    before = {key: module.training for key, module in network.named_modules()}
    state = torch.get_rng_state()
    generated = network.generate_sequence(noise[:, 0], text, STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generated, expected)
    assert not generated.requires_grad
    assert before == {key: module.training for key, module in network.named_modules()}
    assert not torch.equal(network(noise, text).mean, network(noise, text).mean)


@both
def test_the_mode_comes_back_after_an_error(name, monkeypatch):
    network = untrained(name).train()
    network.text_reader.eval()
    before = {key: module.training for key, module in network.named_modules()}
    seen = []

    def fail(*args):
        seen.extend(module.training for module in network.modules())
        raise KeyError("broken")

    monkeypatch.setattr(network, "predict_frames", fail)
    noise, text = sequence_and_text()
    with pytest.raises(KeyError, match="broken"):
        network.generate_sequence(noise[:, 0], text, STEPS)
    assert not any(seen)
    assert before == {key: module.training for key, module in network.named_modules()}


@both
def test_a_hidden_token_has_no_effect(name):
    network = random_network(name)
    noise, text = sequence_and_text()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    other = torch.where(mask[:, :, None] == 0, torch.full_like(text, 9.0), text)
    assert torch.equal(network(noise, text, mask).mean, network(noise, other, mask).mean)
    assert network(noise, text, mask).mean.isfinite().all()
    assert not torch.equal(network(noise, text).mean, network(noise, text, mask).mean)
    full = network(noise, text, torch.ones(2, 5)).mean
    torch.testing.assert_close(full, network(noise, text).mean)
    cut = network(noise[:1], text[:1, :3]).mean
    torch.testing.assert_close(network(noise, text, mask).mean[:1], cut)


@both
def test_a_sample_does_not_depend_on_its_batch(name):
    network = random_network(name)
    noise, text = sequence_and_text(3)
    for index in range(3):
        alone = network(noise[index : index + 1], text[index : index + 1]).mean
        torch.testing.assert_close(alone[0], network(noise, text).mean[index])


@both
def test_sixteen_channels(name):
    network = random_network(name, in_channels=16)
    noise, text = sequence_and_text(channels=16)
    assert network.generate_sequence(noise[:, 0], text, STEPS).shape == noise.shape


@both
def test_half_precision_keeps_the_states_in_float32(name):
    network = random_network(name)
    noise, text = sequence_and_text()
    expected = network.generate_sequence(noise[:, 0], text, STEPS)
    generated = network.bfloat16().generate_sequence(noise[:, 0], text, STEPS)
    assert generated.dtype == torch.float32
    assert 0 < (generated - expected).abs().max() < 0.1


@both
def test_a_network_comes_back_from_its_folder(name, tmp_path):
    network = random_network(name, predict_variance=True)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert loaded.config.num_steps == STEPS
    noise, text = sequence_and_text()
    for mine, other in zip(network(noise, text), loaded(noise, text), strict=True):
        assert torch.equal(mine, other)


@both
@pytest.mark.parametrize("size", ["tiny", "default", "published"])
def test_no_layer_has_more_than_a_quarter_of_the_parameters(name, size):
    network_class, config = NETWORKS[name]
    config = {"tiny": {"text_embed_dim": TEXT_DIM, **config}, "default": {}, "published": PUBLISHED[name]}[size]
    with torch.device("meta"):
        network = network_class(**config)
    layers = {
        key: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for key, module in network.named_modules()
    }
    total = sum(layers.values())
    assert total == sum(parameter.numel() for parameter in network.parameters())
    assert max(layers.values()) <= total / 4


@both
def test_sequences_take_what_the_prompts_were_encoded_to(name):
    network = random_network(name)
    noise, text = sequence_and_text()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    given = TextConditioning(text, attention_mask=mask)
    expected = network.generate_sequence(noise[:, 0], text, STEPS, attention_mask=mask)
    assert torch.equal(network.generate_sequence(noise[:, 0], given, STEPS), expected)


def test_pooled_networks_read_the_pooled_text_of_encoded_prompts():
    network = random_network("rnn", pooled_text=True)
    noise, text = sequence_and_text()
    given = TextConditioning(text, pooled_prompt_embeds=text[:, 0])
    expected = network.generate_sequence(noise[:, 0], text[:, 0], STEPS)
    assert torch.equal(network.generate_sequence(noise[:, 0], given, STEPS), expected)
    with pytest.raises(ValueError, match="must have `pooled_prompt_embeds` for a network with"):
        network.generate_sequence(noise[:, 0], TextConditioning(text), STEPS)

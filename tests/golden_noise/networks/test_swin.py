from __future__ import annotations

import pytest
import torch
from transformers import SwinConfig

from diffusers_ext.golden_noise.networks.npnet_branches import swin_features
from diffusers_ext.golden_noise.networks.swin import Swin, swin_model

CONFIG = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_it_computes_and_names_what_the_one_of_transformers_does():
    theirs, ours = filled(swin_model(SwinConfig(**CONFIG))), Swin(SwinConfig(**CONFIG)).eval()
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs(pixels).last_hidden_state
    torch.testing.assert_close(ours(pixels).last_hidden_state, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(swin_features(ours, pixels), expected, rtol=0, atol=2e-5)


def test_gradients_are_those_of_transformers():
    theirs, ours = filled(swin_model(SwinConfig(**CONFIG))), Swin(SwinConfig(**CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    for model in (theirs, ours):
        model(pixels).last_hidden_state.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_paths_are_dropped_in_training_alone(rate):
    model = filled(Swin(SwinConfig(**CONFIG, drop_path_rate=rate)))
    pixels = torch.randn(4, 3, 32, 32)
    plain = model(pixels).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(model.train()(pixels).last_hidden_state, plain) == (not rate)

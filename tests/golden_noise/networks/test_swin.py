import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import SwinConfig, SwinModel

from diffusers_ext.golden_noise.networks.swin import linear, swin_features


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("depths", "heads", "window"), [((2, 2), (2, 4), 4), ((1,), (2,), 8), ((3, 2, 1), (1, 2, 2), 2)]
)
def test_features_are_those_of_transformers(batch, depths, heads, window):
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=list(depths), num_heads=list(heads), window_size=window
    )
    model = SwinModel(config, add_pooling_layer=False).eval()
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
    model = SwinModel(config, add_pooling_layer=False).eval()
    pixels = torch.randn(1, 3, 16, 16)
    expected = swin_features(model, pixels)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    torch.testing.assert_close(swin_features(model, pixels), expected)

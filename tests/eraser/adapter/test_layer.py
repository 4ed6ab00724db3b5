from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.adapter.projections import EraserProjection
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_erasers import TEXT, WIDTH, add_random_eraser, velocity


def make_layer(*names: str, dtype: torch.dtype = torch.float32) -> EraserLayer:
    torch.manual_seed(0)
    layer = EraserLayer(nn.Dropout(0.0).eval(), WIDTH)
    for name in names:
        layer.update_layer(name, 4, False, torch.device("cpu"))
    layer.set_adapter(list(names))
    return layer.to(dtype)


def added(layer: EraserLayer, name: str, video: torch.Tensor) -> torch.Tensor:
    """`up(GELU(down(x)))` in float64, from the weights."""
    down, up = layer.eraser_down[name].double(), layer.eraser_up[name].double()
    hidden = functional.gelu(video.double() @ down.weight.T + down.bias)
    return hidden @ up.weight.T + up.bias


@torch.no_grad()
def test_it_adds_the_scaled_bottlenecks_to_the_video_tokens():
    layer, video = make_layer("a", "b"), torch.randn(2, 7, WIDTH)
    layer.set_scale("a", 0.75)
    layer.set_scale("b", 2.0)
    layer.set_scale("absent", 3.0)
    output = layer.add_to_video(video)
    expected = video + 0.75 * added(layer, "a", video) + 2.0 * added(layer, "b", video)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(video), video)  # in its place it is the dropout
    assert layer.scaling == {"a": 0.75, "b": 2.0}


@torch.no_grad()
def test_scale_zero_and_a_zero_up_change_no_bit():
    layer, video = make_layer("a"), torch.randn(2, 7, WIDTH)
    assert not torch.equal(layer.add_to_video(video), video)
    layer.set_scale("a", 0.0)
    assert torch.equal(layer.add_to_video(video), video)
    layer.update_layer("a", 4, True, torch.device("cpu"))
    assert layer.scaling == {"a": 1.0}
    assert torch.equal(layer.add_to_video(video), video)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_projection_computes_in_the_dtype_of_its_input(dtype):
    torch.manual_seed(0)
    projection = EraserProjection(6, 4)
    features = torch.randn(3, 6, dtype=dtype)
    output = projection(features, torch.tensor(0.5))
    weight, bias = projection.weight.to(dtype), projection.bias.to(dtype)
    assert output.dtype == dtype
    assert torch.equal(output, functional.linear(features * 0.5, weight, bias * 0.5))
    output.sum().backward()
    assert projection.weight.grad.dtype == projection.weight.dtype == torch.float32
    assert projection.weight.grad.abs().sum() > 0


def test_scaling_is_taken_back_to_the_bit():
    layer = make_layer("a", "b")
    layer.set_scale("a", 0.1)
    layer.set_adapter("a")
    for factor in (0.3, 3.0, 1.0):
        layer.scale_layer(factor)
    assert layer.scaling == {"a": 0.1 * 0.3 * 3.0, "b": 1.0}
    assert layer.scale_tensors["a"].item() == pytest.approx(0.09)
    for factor in (1.0, 3.0, 0.3):
        layer.unscale_layer(factor)
    assert layer.scaling == {"a": 0.1, "b": 1.0}
    layer.unscale_layer(0.5)
    assert layer.scaling["a"] == 0.2
    layer.scale_layer(7.0)
    layer.unscale_layer()
    assert layer.scaling["a"] == layer.scale_tensors["a"].item() == 1.0


def test_a_factor_of_zero_is_taken_back_as_well():
    layer = make_layer("a")
    layer.set_scale("a", 0.4)
    layer.scale_layer(0)
    assert layer.scaling["a"] == layer.scale_tensors["a"].item() == 0.0
    layer.set_scale("a", 1.0)
    assert layer.scaling["a"] == 0.4
    layer.scale_layer(0)
    layer.set_scale("a", 0.9)
    layer.set_scale("a", 1.0)
    assert layer.scaling["a"] == layer.scale_tensors["a"].item() == 1.0


def test_it_is_never_merged():
    layer = make_layer("a", "b")
    with pytest.raises(NotImplementedError, match="Erasers cannot be merged.*\\['a', 'b'\\]"):
        layer.merge()
    with pytest.raises(NotImplementedError, match="name it in `adapter_names`"):
        layer.merge(adapter_names=["lora", "b"])
    layer.merge(adapter_names=["lora"])
    layer.unmerge()
    assert not layer.merged
    assert not layer.supports_lora_conversion()


class Attention(nn.Module):
    """A joint attention that passes on what it gets, with an eraser's layer at its end."""

    processor = None

    def __init__(self, layer):
        super().__init__()
        self.to_out = nn.ModuleList([nn.Identity(), layer])

    def forward(self, *tokens):
        return tokens


def test_the_attention_gives_the_video_with_what_is_added():
    layer = make_layer("a")
    attention = Attention(layer)
    layer.watch_attention(attention)
    layer.watch_attention(attention)
    assert len(attention._forward_hooks) == 1
    video, text = torch.randn(1, 4, WIDTH), torch.randn(1, TEXT, WIDTH)
    erased, same_text = attention(video, text)
    assert torch.equal(erased, layer.add_to_video(video))
    assert torch.equal(same_text, text)
    with pytest.raises(ValueError, match=r"must give \(video, text\), got a tuple.*processor of Cog"):
        attention(video)
    attention.to_out[1] = layer.base_layer
    assert attention(video, text)[0] is video
    layer.forget_attention()
    layer.forget_attention()
    assert not attention._forward_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_is_independent(duplicate):
    model = tiny_transformer()
    add_random_eraser(model, "a")
    model.set_adapters("a", 0.7)
    expected = velocity(model)
    twin = duplicate(model)
    model.set_adapters("a", 0.0)
    model.unload_lora()
    assert torch.equal(velocity(twin), expected)
    twin.set_adapters("a", 0.0)
    assert torch.equal(velocity(twin), velocity(model))
    twin.unload_lora()
    gc.collect()
    assert not any(module._forward_hooks for module in twin.modules())


def test_a_new_layer_is_in_the_mode_of_the_model():
    model = tiny_transformer()
    add_random_eraser(model)
    assert not any(module.training for module in model.modules())
    layers = eraser_layers(model)
    assert all(layer.base_layer.p == 0.0 for layer in layers.values())

"""Frozen erasers are computed as one, and never from weights, scales or choices of before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusers_ext.eraser.adapter.layer import EraserLayer
from tests.tiny_erasers import WIDTH

NAMES = ("a", "b", "c", "d")


def stacked(kind: str = "gelu", frozen: bool = True) -> EraserLayer:
    torch.manual_seed(0)
    layer = EraserLayer(nn.Dropout(0.0).eval(), WIDTH)
    for name in NAMES:
        layer.update_layer(name, 4, False, torch.device("cpu"), kind)
    layer.set_adapter(list(NAMES))
    return layer.requires_grad_(not frozen)


def add(layer: EraserLayer, tokens: torch.Tensor) -> torch.Tensor:
    linear = "linear" in layer.kinds.values()
    return layer.add_to_projection(tokens, tokens) if linear else layer.add_to_video(tokens)


def one_by_one(layer: EraserLayer, tokens: torch.Tensor) -> torch.Tensor:
    return tokens + sum(layer.erase(name, tokens) for name in layer.active_adapters)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gelu", "linear"])
@torch.no_grad()
def test_four_erasers_are_as_one(kind, tokens):
    layer = stacked(kind)
    layer.set_scale("b", 0.5)
    torch.testing.assert_close(add(layer, tokens), one_by_one(layer, tokens))
    fused = layer._fused[kind]
    assert fused.down.shape == (16, WIDTH)
    add(layer, tokens)
    assert layer._fused[kind] is fused
    layer.set_scale("a", 0.0)
    torch.testing.assert_close(add(layer, tokens), one_by_one(layer, tokens))
    assert layer._fused[kind].down.shape == (12, WIDTH)


def written(layer):
    layer.eraser_up["a"].weight.mul_(2.0)


def replaced(layer):
    layer.eraser_down["c"].weight = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)


def cast_and_back(layer):
    layer.half().float()


def loaded(layer):
    layer.load_state_dict({name: value + 1.0 for name, value in layer.state_dict().items()})


CHANGES = {
    "written in place": written,
    "a new parameter": replaced,
    "cast": cast_and_back,
    "loaded": loaded,
    "scale": lambda layer: layer.set_scale("d", 0.25),
    "scale of the call": lambda layer: layer.scale_layer(0.5),
    "active": lambda layer: layer.set_adapter(["a", "c"]),
    "order": lambda layer: layer.set_adapter(["b", "a"]),
    "deleted": lambda layer: layer.delete_adapter("b"),
    "anew": lambda layer: layer.update_layer("a", 2, False, torch.device("cpu")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_every_change_is_seen_at_the_next_call(change, tokens):
    layer = stacked()
    before = add(layer, tokens)
    change(layer)
    layer.requires_grad_(False)
    after = add(layer, tokens)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, one_by_one(layer, tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_train_or_come_in_hooks_are_read_at_every_call(tokens):
    layer = stacked(frozen=False)
    before = add(layer, tokens)
    assert not layer._fused
    layer.eraser_up["a"].weight.data.mul_(2.0)  # as the moving average of weights is put in
    assert not torch.equal(add(layer, tokens), before)
    layer.requires_grad_(False)
    add(layer, tokens)
    assert "gelu" in layer._fused
    layer.eraser_down["b"].register_forward_pre_hook(lambda module, arguments: None)
    layer.set_scale("b", 0.5)
    add(layer, tokens)
    assert not layer._fused


def test_gradients_pass_and_copies_fuse_their_own(tokens):
    layer = stacked()
    with torch.inference_mode():
        add(layer, tokens)
    tokens.requires_grad_(True)
    (gradient,) = torch.autograd.grad(add(layer, tokens).square().sum(), tokens)
    (expected,) = torch.autograd.grad(one_by_one(layer, tokens).square().sum(), tokens)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(layer)
    assert not twin._fused
    assert torch.equal(add(twin, tokens), add(layer, tokens))
    assert add(layer, tokens.double()).dtype == torch.float64


@torch.no_grad()
def test_a_refused_scale_is_not_forgotten(tokens):
    layer = stacked()
    add(layer, tokens)
    layer.scale_layer(-1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="at least 0, got -1"):
            add(layer, tokens)

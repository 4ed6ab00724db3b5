"""Erasers on transformers that are offloaded, stored in few bits, or both."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.files import load_eraser, save_eraser
from tests.eraser.saved_erasers import run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_eraser(tmp_path_factory.mktemp("eraser"))


@pytest.fixture(scope="module")
def expected(folder):
    transformer = tiny_transformer()
    load_eraser(transformer, folder)
    return run(transformer)


def projections(transformer: nn.Module) -> list[nn.Module]:
    return [
        modules["default"]
        for layer in eraser_layers(transformer).values()
        for modules in (layer.eraser_down, layer.eraser_up)
    ]


@pytest.mark.parametrize("first", ["eraser", "offloading"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(folder, expected, first, kind):
    transformer = tiny_transformer()
    if first == "eraser":
        load_eraser(transformer, folder)
    transformer.enable_group_offload(CPU, offload_type=kind, num_blocks_per_group=1 if kind == "block_level" else None)
    if first == "offloading":
        load_eraser(transformer, folder)
    assert torch.equal(run(transformer), expected)
    if kind == "leaf_level":
        # Else they would stay behind where the rest is moved to the accelerator.
        assert all(part._diffusers_hook.get_hook("group_offloading") for part in projections(transformer))


def test_cpu_offload_of_the_whole_model(folder, expected):
    transformer = tiny_transformer()
    _, hook = accelerate.cpu_offload_with_hook(transformer, CPU)
    load_eraser(transformer, folder)
    assert torch.equal(run(transformer), expected)
    hook.offload()
    assert torch.equal(run(transformer), expected)


def test_sequential_cpu_offload_comes_after_the_eraser(folder, expected, tmp_path):
    transformer = tiny_transformer()
    load_eraser(transformer, folder)
    accelerate.cpu_offload(transformer, CPU)
    assert all(part.weight.is_meta for part in projections(transformer))
    assert torch.equal(run(transformer), expected)
    transformer.set_adapters("default", 0.0)
    assert torch.equal(run(transformer), run(tiny_transformer()))
    with pytest.raises(ValueError, match="must hold its weights, got some on the meta device"):
        load_eraser(transformer, folder, adapter_name="second")
    with pytest.raises(ValueError, match="must be in memory, got the meta device"):
        save_eraser(transformer, tmp_path / "new")
    remove_hook_from_module(transformer, recurse=True)
    save_eraser(transformer, tmp_path / "new")
    again = tiny_transformer()
    load_eraser(again, tmp_path / "new")
    assert torch.equal(run(again), expected)


@pytest.mark.parametrize("first", ["eraser", "casting"])
def test_layerwise_casting(folder, expected, first, tmp_path):
    base = tiny_transformer()
    base.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    transformer = tiny_transformer()
    if first == "eraser":
        load_eraser(transformer, folder)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    if first == "casting":
        load_eraser(transformer, folder)
    if first == "eraser":
        with pytest.raises(ValueError, match="as torch.float8_e4m3fn, as after layerwise casting"):
            save_eraser(transformer, tmp_path / "again")
    else:
        save_eraser(transformer, tmp_path / "again")
    output = run(transformer)
    effect = (output - run(base)).norm()
    full = (expected - run(tiny_transformer())).norm()
    stored = torch.float8_e4m3fn if first == "eraser" else torch.float32
    assert {part.weight.dtype for part in projections(transformer)} == {stored}
    assert effect / full == pytest.approx(1, abs=0.1)
    assert (output - expected).norm() / full < 0.1
    transformer.set_adapters("default", 0.0)
    assert torch.equal(run(transformer), run(base))


class PackedLinear(nn.Linear):
    """Weights of a Linear in 8 bits, in a column, as quantised Linears keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        step = linear.weight.abs().max() / 127
        packed = (linear.weight / step).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.step = step.detach()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(self.out_features, self.in_features).to(features.dtype)
        return nn.functional.linear(features, weight * self.step, self.bias)


def pack(transformer: nn.Module) -> nn.Module:
    for block in transformer.transformer_blocks:
        for parent, name in ((block.attn1.to_out, "0"), (block.attn1, "to_q")):
            setattr(parent, name, PackedLinear(getattr(parent, name)))
    return transformer


def test_a_base_of_packed_weights(folder, expected):
    transformer = pack(tiny_transformer())
    base = run(transformer)
    load_eraser(transformer, folder)
    assert {part.weight.dtype for part in projections(transformer)} == {torch.float32}
    torch.testing.assert_close(run(transformer), expected, atol=0.1, rtol=0)
    transformer.unload_lora()
    assert torch.equal(run(transformer), base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_base(folder, expected):
    transformer = tiny_transformer()
    torch.ao.quantization.quantize_dynamic(transformer, {nn.Linear}, inplace=True)
    base = run(transformer)
    load_eraser(transformer, folder)
    torch.testing.assert_close(run(transformer), expected, atol=0.1, rtol=0)
    transformer.unload_lora()
    assert torch.equal(run(transformer), base)

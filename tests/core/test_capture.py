from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from diffusers_ext.core.capture import capture, find_modules, first_tensor, match_names, natural_key, refuse_fused
from tests.in_a_thread import in_a_thread
from tests.tiny_lora import add_random_lora
from tests.tiny_models import DENOISERS, flux, pixart, sd_unet

QKV = "*.to_[qkv]"


def hooks_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in model.named_modules()}


class Store(defaultdict):
    """A sink that keeps everything."""

    def __init__(self):
        super().__init__(list)

    def __call__(self, name, features):
        self[name].append(features)


@torch.no_grad()
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("builder", DENOISERS.values(), ids=DENOISERS)
def test_every_linear_is_captured_and_nothing_changes(builder, side):
    tiny, store = builder(), Store()
    before, hooks = tiny.run(), hooks_of(tiny.model)
    linears = find_modules(tiny.model, QKV)
    with capture(tiny.model, QKV, store, side=side) as names:
        during = tiny.run()
    assert torch.equal(during, before)
    assert torch.equal(tiny.run(), before)
    assert names == list(linears)
    assert set(store) == set(names)
    width = {"input": "in_features", "output": "out_features"}[side]
    for name, linear in linears.items():
        assert [features.shape[-1] for features in store[name]] == [getattr(linear, width)]
    assert hooks_of(tiny.model) == hooks


@torch.no_grad()
def test_features_are_what_the_linear_reads_and_writes():
    tiny, read, written = sd_unet(), Store(), Store()
    layer = "*attn2.to_k"
    with capture(tiny.model, layer, read), capture(tiny.model, layer, written, side="output"):
        tiny.run()
    for name, linear in find_modules(tiny.model, layer).items():
        assert torch.equal(read[name][0], tiny.inputs["encoder_hidden_states"])
        assert torch.equal(written[name][0], linear(read[name][0]))


def test_features_are_detached():
    tiny, store = sd_unet(), Store()
    with capture(tiny.model, "*", store):
        assert tiny.run().requires_grad
    assert not any(features.requires_grad for calls in store.values() for features in calls)


def test_exception_inside_leaves_no_hook():
    tiny = sd_unet()
    hooks = hooks_of(tiny.model)

    def stop_inside():
        with capture(tiny.model, QKV, Store()):
            assert hooks_of(tiny.model) != hooks
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stop_inside()
    assert hooks_of(tiny.model) == hooks


@torch.no_grad()
def test_exception_of_the_sink_comes_through_and_leaves_no_hook():
    def fail(name, features):
        raise OSError(f"{name}: disk full")

    tiny = sd_unet()
    hooks, before = hooks_of(tiny.model), tiny.run()
    with pytest.raises(OSError, match="disk full"), capture(tiny.model, QKV, fail):
        tiny.run()
    assert hooks_of(tiny.model) == hooks
    assert torch.equal(tiny.run(), before)


@torch.no_grad()
def test_lora_is_seen_through():
    tiny, plain, adapted = sd_unet(), Store(), Store()
    with capture(tiny.model, "*attn2.to_k", plain):
        tiny.run()
    add_random_lora(tiny.model)
    with_lora = tiny.run()
    with capture(tiny.model, "*attn2.to_k", adapted) as names:
        assert torch.equal(tiny.run(), with_lora)
    assert names == list(plain)
    assert all(torch.equal(adapted[name][0], plain[name][0]) for name in names)


def test_gradient_checkpointing_reads_twice_and_keeps_gradients():
    def gradients(sink=None) -> list[torch.Tensor]:
        tiny = sd_unet()
        tiny.model.train()
        tiny.model.enable_gradient_checkpointing()
        if sink is None:
            tiny.run().sum().backward()
        else:
            with capture(tiny.model, QKV, sink):
                tiny.run().sum().backward()
        return [parameter.grad for parameter in tiny.model.parameters()]

    store = Store()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(store)))
    assert {len(calls) for calls in store.values()} == {2}


@pytest.mark.parametrize("builder", [sd_unet, flux, pixart])
def test_fused_projections_are_refused(builder):
    tiny = builder()
    tiny.model.fuse_qkv_projections()
    linears = find_modules(tiny.model, QKV)
    hooks = hooks_of(tiny.model)
    with (
        pytest.raises(ValueError, match=r"`.*to_k` must not be fused.*unfuse_qkv_projections"),
        capture(tiny.model, "*.to_k", Store()),
    ):
        pass
    renamed = {"mine": next(iter(linears.values()))}
    with pytest.raises(ValueError, match="`mine` must not be fused"):
        refuse_fused(tiny.model, renamed)
    assert hooks_of(tiny.model) == hooks


def test_fused_projections_are_refused_under_a_lora():
    tiny = sd_unet()
    tiny.model.fuse_qkv_projections()
    add_random_lora(tiny.model)
    with (
        pytest.raises(ValueError, match=r"`.*to_k.base_layer` must not be fused"),
        capture(tiny.model, "*.to_k.base_layer", Store()),
    ):
        pass


@torch.no_grad()
def test_output_projection_may_be_read_when_fused():
    tiny, store = sd_unet(), Store()
    tiny.model.fuse_qkv_projections()
    with capture(tiny.model, "*.to_out.0", store) as names:
        tiny.run()
    assert set(store) == set(names)


@torch.no_grad()
def test_keyword_inputs_and_tuples_are_read():
    tiny, store = sd_unet(), Store()
    with capture(tiny.model, ["time_proj", "down_blocks.0"], store):
        tiny.run()
    assert store["down_blocks.0"][0].shape == (2, 16, 8, 8)
    pair = (torch.ones(1), torch.zeros(1))
    assert torch.equal(first_tensor(pair), pair[0])


def test_unknown_side_is_an_error():
    with (
        pytest.raises(ValueError, match="`side` must be 'input' or 'output', got 'both'"),
        capture(sd_unet().model, QKV, Store(), side="both"),
    ):
        pass


@torch.no_grad()
def test_what_other_threads_run_is_not_captured():
    tiny, store = sd_unet(), Store()
    with capture(tiny.model, "*attn2.to_k", store) as names:
        in_a_thread(torch.no_grad()(tiny.run))
        assert not store
        tiny.run()
    assert set(store) == set(names)


def test_natural_order_counts_numbers():
    names = ["blocks.10.a", "blocks.2.a", "a.1", "blocks.2", "blocks.2.a10", "blocks.2.a9"]
    assert sorted(names, key=natural_key) == [
        "a.1",
        "blocks.2",
        "blocks.2.a",
        "blocks.2.a9",
        "blocks.2.a10",
        "blocks.10.a",
    ]


def test_pattern_finds_modules_in_natural_order():
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(12)])
    found = find_modules(model, "*.0")
    assert list(found) == [f"{index}.0" for index in range(12)]
    assert all(found[f"{index}.0"] is model[index][0] for index in range(12))


def test_patterns_add_up_without_repetition():
    unet = sd_unet().model
    keys = list(find_modules(unet, "*attn2.to_k"))
    values = list(find_modules(unet, "*attn2.to_v"))
    both = list(find_modules(unet, ["*attn2.to_[kv]", "*attn2.to_v"]))
    assert len(keys) == len(values) == 4
    assert both == sorted(keys + values, key=natural_key)


def test_patterns_are_case_sensitive_and_match_whole_names():
    assert match_names(["a.To_k", "a.to_k", "a.to_k.b"], "*to_k", "names") == ["a.to_k"]


def test_mapping_is_taken_as_it_is():
    linear = torch.nn.Linear(2, 2)
    assert find_modules(sd_unet().model, {"mine": linear}) == {"mine": linear}


def test_pattern_without_match_is_an_error():
    with pytest.raises(ValueError, match=r"of UNet2DConditionModel, got '\*attn3', which .*conv_in"):
        find_modules(sd_unet().model, ["*attn2", "*attn3"])


@pytest.mark.parametrize(("targets", "rule"), [([], "one pattern"), ({}, "one module")])
def test_no_target_is_an_error(targets, rule):
    with pytest.raises(ValueError, match=f"`targets` must .* at least {rule}, got none"):
        find_modules(sd_unet().model, targets)

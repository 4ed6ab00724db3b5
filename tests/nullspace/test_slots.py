from __future__ import annotations

import pytest

from diffusers_ext.core.capture import natural_key
from diffusers_ext.nullspace.slots import (
    FEATURES,
    SLOT_PATHS,
    check_features,
    check_widths,
    find_linears,
    linear_name,
    split_linear_name,
)
from tests.tiny_lora import add_random_lora
from tests.tiny_models import pixart, sd3, sd_unet, sdxl_unet, wan


def test_linear_names_and_slots_are_inverse():
    for slot in SLOT_PATHS:
        assert split_linear_name(linear_name("mid.blocks.0.attn2", slot)) == ("mid.blocks.0.attn2", slot)
    assert linear_name("mid.attn2", "k") == "mid.attn2.to_k"
    assert split_linear_name("blocks.3.ff.net.2") == ("blocks.3.ff", "ff_out")


def test_names_that_are_no_slot_are_refused():
    with pytest.raises(ValueError, match=r"`slot` must be one of \['ff_in', .*, got 'K'"):
        linear_name("mid.attn2", "K")
    with pytest.raises(ValueError, match=r"`name` must end in one of .*, got 'mid.attn2.to_kv'"):
        split_linear_name("mid.attn2.to_kv")


def test_one_feature_may_be_a_string():
    assert check_features("attn1.q") == ("attn1.q",)
    assert check_features(["v", "k"]) == ("k", "v")


@pytest.mark.parametrize(("features", "got"), [(("k", "keys"), r"\['keys'\]"), ((), "none")])
def test_unknown_features_are_refused(features, got):
    with pytest.raises(ValueError, match=rf"`features` must be among \['q', 'k', .*, got {got}"):
        check_features(features)


@pytest.mark.parametrize(("build", "blocks"), [(sd_unet, 4), (sdxl_unet, 8), (pixart, 2)])
def test_every_feature_is_found_in_every_block(build, blocks):
    model = build().model
    found = find_linears(model, list(FEATURES))
    assert len(found) == blocks * len(FEATURES)
    assert list(found) == sorted(found, key=natural_key)
    for name, module in found.items():
        assert model.get_submodule(name) is module
        assert module.in_features > 0
    widths = {module.in_features for name, module in find_linears(model, "k").items()}
    assert widths == {model.config.cross_attention_dim}


def test_layers_are_indices_in_natural_order():
    model = sdxl_unet().model
    blocks = [name.removesuffix(".attn2.to_k") for name in find_linears(model, "k")]
    found = find_linears(model, ("ff.in", "v"), layers=[5, 0, 5])
    assert list(found) == [f"{blocks[i]}.{p}" for i in (0, 5) for p in ("attn2.to_v", "ff.net.0.proj")]  # fmt: skip


@pytest.mark.parametrize("layers", [[4], [0, -1], [], "none", 2, ["0"], [0.5]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match=r"`layers` must be 'all' or indices from 0 to 3, got "):
        find_linears(sd_unet().model, "k", layers)


def test_models_without_cross_attention_are_refused():
    message = "`denoiser` must have cross-attention layers named `attn2`, got SD3Transformer2DModel"
    with pytest.raises(ValueError, match=message):
        find_linears(sd3().model, "k")


def test_a_feature_that_no_layer_has_is_refused():
    assert len(find_linears(wan().model, ("k", "attn1.out"))) == 4
    with pytest.raises(ValueError, match="`features` must exist in the model, got 'ff.in'"):
        find_linears(wan().model, ("k", "ff.in"))


def test_linears_with_a_lora_keep_their_names():
    model = sd_unet().model
    before = list(find_linears(model, list(FEATURES)))
    adapted = add_random_lora(model)
    found = find_linears(model, list(FEATURES))
    assert list(found) == before
    assert all(found[name] is layer for name, layer in adapted.items())
    check_widths(model, {name: module.in_features for name, module in found.items()})


def test_linears_of_another_model_are_refused():
    unet = sd_unet().model
    name = next(iter(find_linears(unet, "k")))
    check_widths(unet, {name: 32})
    with pytest.raises(ValueError, match=rf"`statistics` of '{name}' .* model's width 32, got 24"):
        check_widths(unet, {name: 24})
    with pytest.raises(ValueError, match=r"must be of this model, got some of 'gone.to_k'"):
        check_widths(unet, {name: 32, "gone.to_k": 32})

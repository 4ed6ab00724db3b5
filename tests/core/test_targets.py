from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.capture import find_modules, match_names, natural_key
from tests.tiny_models import sd_unet


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
    with pytest.raises(
        ValueError, match=r"of UNet2DConditionModel, got '\*attn3', which .*conv_in"
    ):
        find_modules(sd_unet().model, ["*attn2", "*attn3"])


@pytest.mark.parametrize(("targets", "rule"), [([], "one pattern"), ({}, "one module")])
def test_no_target_is_an_error(targets, rule):
    with pytest.raises(ValueError, match=f"`targets` must .* at least {rule}, got none"):
        find_modules(sd_unet().model, targets)

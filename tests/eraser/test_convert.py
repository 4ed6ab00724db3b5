"""Names and shapes of eraser weights."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.formats import EraserShape, check_fit, eraser_shape, from_legacy, layer_name, to_legacy

SHAPES = {"down.weight": (2, 6), "down.bias": (2,), "up.weight": (6, 2), "up.bias": (6,)}


def legacy_tree(blocks=(0, 1)):
    return {f"transformer_blocks.{i}.attn1.adapter": {p: torch.randn(s) for p, s in SHAPES.items()} for i in blocks}


def test_legacy_names_go_there_and_back():
    tree = legacy_tree()
    tensors = from_legacy(tree)
    assert len(tensors) == 8
    name = layer_name("transformer_blocks.1.attn1", "up.weight")
    assert name == "transformer_blocks.1.attn1.to_out.1.eraser_up.weight"
    assert torch.equal(tensors[name], tree["transformer_blocks.1.attn1.adapter"]["up.weight"])
    back = to_legacy(tensors, num_layers=2)
    assert back.keys() == tree.keys()
    for key, parts in tree.items():
        assert back[key].keys() == parts.keys()
        assert all(torch.equal(back[key][part], value) for part, value in parts.items())


def test_blocks_without_an_eraser_are_zero_in_the_legacy_form():
    tensors = from_legacy(legacy_tree(blocks=(1, 2)))
    back = to_legacy(tensors, num_layers=4)
    for index, parts in enumerate(back.values()):
        assert all(bool(value.any()) == (index in (1, 2)) for value in parts.values())
        assert {part: tuple(value.shape) for part, value in parts.items()} == SHAPES


def test_shape_is_read_from_the_tensors():
    assert eraser_shape(from_legacy(legacy_tree((3, 0)))) == EraserShape(6, 2, (0, 3))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([torch.zeros(2)], "must hold a dictionary of erasers, got a list"),
        ({}, "got an empty dictionary"),
        ({"layer.weight": torch.zeros(2)}, "must be transformer_blocks.<i>.attn1.adapter"),
        (
            {"single_transformer_blocks.0.attn.adapter": {}},
            "got 'single_transformer_blocks.0.attn.adapter'. Only erasers of CogVideoX",
        ),
        ({"transformer_blocks.0.attn1.adapter": torch.zeros(2)}, "got Tensor"),
        ({"transformer_blocks.0.attn1.adapter": {"down.weight": 1}}, r"got \['down.weight'\]"),
        (
            {"transformer_blocks.0.attn1.adapter": dict.fromkeys(SHAPES, 1.0)},
            "`transformer_blocks.0.attn1.adapter.down.weight` must be a tensor, got float",
        ),
    ],
)
def test_what_is_no_legacy_eraser_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        from_legacy(tree)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("up.bias", None, r"eraser_up.bias` must be \(6,\), got none"),
        ("down.weight", None, "must hold the matrix"),
        ("up.weight", torch.zeros(6, 3), r"eraser_up.weight` must be \(6, 2\), got \(6, 3\)"),
        ("down.bias", torch.tensor([1.0, float("nan")]), "eraser_down.bias` must be finite"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(part, value, message):
    tensors = from_legacy(legacy_tree((0,)))
    name = layer_name("transformer_blocks.0.attn1", part)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        eraser_shape(tensors)


def test_other_tensors_are_no_eraser():
    with pytest.raises(ValueError, match="got `transformer_blocks.0.attn1.to_q.lora_A.weight`"):
        eraser_shape({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="got no tensors"):
        eraser_shape({})


def test_an_eraser_of_another_model_is_refused_with_both_sizes():
    of_2b = EraserShape(1920, 128, tuple(range(30)))
    check_fit(of_2b, 1920, 30, 30)
    check_fit(of_2b._replace(blocks=(3, 4)), 1920, 30, None)
    both = "of width 3072 with 42 blocks, got one for width 1920 with 30 blocks"
    for made_for in (30, None):
        with pytest.raises(ValueError, match=both):
            check_fit(of_2b, 3072, 42, made_for)
    with pytest.raises(ValueError, match="with 42 blocks, got one for width 1920 with 30 blocks"):
        check_fit(of_2b, 1920, 42, 30)
    with pytest.raises(ValueError, match="with 20 blocks, got one for width 1920 with 30 blocks"):
        check_fit(of_2b, 1920, 20, None)

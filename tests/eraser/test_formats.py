"""Files of erasers: what is damaged, missing or something else, legacy names, and repositories on the Hub."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from diffusers_ext.eraser import formats as eraser_files
from diffusers_ext.eraser.adapter.tensors import EraserShape, check_fit, eraser_shape, layer_name
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.eraser.formats import from_legacy, read_eraser, to_legacy
from diffusers_ext.hub.connection import RemoteEntryNotFoundError
from tests.eraser.legacy_fixture import FOLDER
from tests.eraser.saved_erasers import saved_eraser
from tests.tiny_cogvideox import tiny_transformer

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


@pytest.fixture
def folder(tmp_path):
    return saved_eraser(tmp_path / "eraser")


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))
    weights = path.with_name("adapter_model.safetensors")
    if weights.exists():  # as of another program, whose digest cannot tell
        weights.write_bytes(save(load_file(weights), metadata={"format": "pt"}))


def test_a_config_changed_by_hand_is_told_by_the_weights(folder):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"base_model_name_or_path": "user/renamed"}))
    assert read_eraser(folder).config.base_model_name_or_path == "user/renamed"
    path.write_text(json.dumps(content | {"concept": "another"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json must be the config that"):
        read_eraser(folder)


def test_one_altered_weight_is_found(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors must have the contents"):
        read_eraser(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "must have the `peft_type` 'ERASER', got 'LORA'. A LoRA is loaded"),
        ({"r": 5}, "must be the rank 4 of the weights, got 5"),
        ({"layers_to_transform": [1]}, "for the 1 layers that its config names, got 2"),
        ({"exclude_modules": ["transformer_blocks.0.attn1.to_out.1"]}, "for the 1 layers"),
        ({"target_modules": "(([a-z_0-9.]+)+)+!"}, "adapter_config.json must be .* repeated groups"),
        ({"r": 10**9}, "adapter_config.json must be the rank 4 of the weights"),
        ({"r": "4"}, "adapter_config.json must be the config of an eraser, got: `r` must be an int"),
        ({"num_layers": 300_000}, "adapter_config.json must be .* `num_layers` must be at most 1000"),
        ({"num_layers": 1}, "`num_layers` of .*adapter_config.json must be above the last block"),
        ({"in_features": 64}, "`in_features` of .*adapter_config.json must be the width 32"),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_refused(folder, changes, message):
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_eraser(tiny_transformer(), folder)


@pytest.mark.parametrize("change", ["missing", "extra", "half of int", "not finite", "shape"])
def test_weights_are_those_of_an_eraser(folder, change):
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.transformer_blocks.1.attn1.to_out.1.eraser_up.bias"
    wrong = {
        "half of int": tensors[name].to(torch.int16),
        "not finite": torch.full_like(tensors[name], float("nan")),
        "shape": tensors[name][:-1].clone(),
    }
    tensors[name] = wrong.get(change, tensors[name])
    if change == "missing":
        del tensors[name]
    if change == "extra":
        tensors[name + ".more"] = torch.zeros(1)
    save_file(tensors, weights)
    transformer = tiny_transformer()
    before = [part for part, _ in transformer.named_modules()]
    with pytest.raises(ValueError, match="adapter_model.safetensors.*eraser_up.bias"):
        load_eraser(transformer, folder)
    assert [part for part, _ in transformer.named_modules()] == before


def test_damaged_or_missing_files_are_refused(tmp_path, folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_eraser(folder)
    weights.write_bytes(whole)
    save_file({key.removeprefix("base_model."): t for key, t in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="must start with 'base_model.model.', got 'model.tran"):
        read_eraser(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="got no adapter_model.safetensors"):
        read_eraser(folder)
    config.write_text("{")
    weights.touch()
    with pytest.raises(ValueError, match="must hold JSON"):
        read_eraser(folder)
    config.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_eraser(tiny_transformer(), folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        read_eraser(folder)
    config.unlink()
    expected = "adapter_config.json and .* or eraser_config.json and .*, got "
    with pytest.raises(ValueError, match=expected + r"\['adapter_model.safetensors'\]"):
        read_eraser(folder)
    with pytest.raises(ValueError, match="must be a folder or 'user/name', got the file"):
        read_eraser(FOLDER / "eraser_weights.pt")
    with pytest.raises(ValueError, match="no such folder"):
        read_eraser(tmp_path / "nowhere" / "deep")
    with pytest.raises(ValueError, match="sub must hold .* got no such folder"):
        read_eraser(folder, subfolder="sub")


class Attack:
    def __reduce__(self):
        return os.mkdir, ("made-by-the-pickle",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"transformer_blocks.0.attn1.adapter": Attack()}, "damaged or would run code"),
        ([torch.zeros(2)], "must hold a dictionary of erasers, got a list"),
        (torch.zeros(2), "must hold a dictionary of erasers, got a Tensor"),
        (b"PK\x03\x04 cut short", "must be a whole file of `torch.save`"),
        (b"no pickle", "damaged or would run code"),
        (b"", "must be a whole file of `torch.save`"),
    ],
)
def test_a_pickle_that_is_no_eraser_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / "eraser_config.json", tmp_path)
    path = tmp_path / "eraser_weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_eraser(tmp_path)
    assert not (tmp_path / "made-by-the-pickle").exists()


def test_a_legacy_config_must_describe_the_weights(tmp_path):
    for name in ("eraser_config.json", "eraser_weights.pt"):
        shutil.copy(FOLDER / name, tmp_path)
    edit(tmp_path / "eraser_config.json", eraser_rank=128)
    with pytest.raises(ValueError, match="must be the rank 4 of the weights, got 128"):
        read_eraser(tmp_path)
    edit(tmp_path / "eraser_config.json", eraser_type="lora")
    with pytest.raises(ValueError, match="`eraser_type` of .* must be 'adapter', got 'lora'"):
        read_eraser(tmp_path)


def test_hub_repositories_are_searched_for_either_format(monkeypatch, tmp_path):
    calls = []

    def download(repo_id, filename, **arguments):
        calls.append((repo_id, filename, arguments))
        path = tmp_path / arguments["subfolder"] / filename
        if not path.is_file():
            raise RemoteEntryNotFoundError("404", response=NotFound())
        return str(path)

    class NotFound:
        headers: dict[str, str] = {}
        request = None

    monkeypatch.setattr(eraser_files, "hf_hub_download", download)
    saved_eraser(tmp_path / "new")
    saved_eraser(tmp_path / "old", format="legacy")
    (tmp_path / "none").mkdir()
    assert read_eraser("user/name", subfolder="new", revision="r").config.r == 4
    assert calls[0][2] == {"subfolder": "new", "revision": "r"}
    assert read_eraser("user/name", subfolder="old").shape.rank == 4
    with pytest.raises(ValueError, match="Repository user/name must hold .* got neither"):
        read_eraser("user/name", subfolder="none")


def test_deeply_nested_json_is_refused_by_name(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises((ValueError, OSError), match="adapter_config"):
        load_eraser(tiny_transformer(), folder)

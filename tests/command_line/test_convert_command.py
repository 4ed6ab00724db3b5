from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.eraser.formats import read_eraser
from diffusers_ext.families.lora_files import export_lora, read_lora
from diffusers_ext.golden_noise.networks.npnet import NPNet
from tests.eraser.saved_erasers import saved_eraser
from tests.golden_noise.npnet_fixture import small_npnet


def test_lora_to_kohya(run, lora, tmp_path):
    target = tmp_path / "kohya.safetensors"
    ran = run("convert", "lora", lora, target, "--format", "kohya", "--json")
    expected = export_lora(lora, "kohya")
    assert ran.facts == {"destination": str(target), "format": "kohya", "tensors": len(expected)}
    found = load_file(target)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in found)


def test_lora_back_from_kohya(run, lora, tmp_path):
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    export_lora(lora, "kohya", kohya)
    assert run("convert", "lora", kohya, back, "--format", "diffusers").code == 0
    found, expected = load_file(back), read_lora(lora)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-6) for key in expected)


def test_lora_to_diffusers_folds_its_scale(run, lora, tmp_path):
    target = tmp_path / "plain.safetensors"
    ran = run("convert", "lora", lora, target, "--format", "diffusers")
    assert ran == (0, f"Wrote {target} (format diffusers, tensors 28).\n", "")
    raw, found = load_file(lora / "pytorch_lora_weights.safetensors"), load_file(target)
    key = next(key for key in found if key.endswith("lora_B.weight"))
    assert found[key].equal(2 * raw[key])


def test_eraser_there_and_back(run, tmp_path):
    source, legacy, back = (tmp_path / name for name in ("source", "legacy", "back"))
    saved_eraser(source)
    ran = run("convert", "eraser", source, legacy, "--format", "legacy", "--json")
    assert ran.facts == {
        "destination": str(legacy), "format": "legacy", "rank": 4, "width": 32, "blocks": 2,
    }  # fmt: skip
    flags = {"format": "peft", "concept": "dog", "anchor_concept": "cat", "base_model": "x/y"}
    assert run("convert", "eraser", legacy, back, **flags).code == 0
    first, last = read_eraser(source), read_eraser(back)
    assert all(first.tensors[name].equal(tensor) for name, tensor in last.tensors.items())
    assert (last.config.concept, last.config.anchor_concept) == ("dog", "cat")
    assert last.config.base_model_name_or_path == "x/y"


def test_a_linear_eraser_as_a_lora(run, tmp_path):
    saved_eraser(tmp_path / "source", kind="linear")
    ran = run(
        "convert", "eraser", tmp_path / "source", tmp_path / "lora", "--format", "lora", "--scale", "0.5", "--json"
    )
    assert ran.facts == {
        "destination": str(tmp_path / "lora"), "format": "lora", "files": "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    tensors = read_eraser(tmp_path / "source").tensors
    found = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert len(found) == len(tensors) == 4
    up = tensors["transformer_blocks.1.attn1.to_out.1.eraser_up.weight"]
    assert found["transformer.transformer_blocks.1.attn1.to_out.0.lora_B.weight"].equal(0.5 * up)
    saved_eraser(tmp_path / "gelu")
    refused = run("convert", "eraser", tmp_path / "gelu", tmp_path / "none", "--format", "lora")
    assert (refused.code, (tmp_path / "none").exists()) == (1, False)
    assert "must be of the kind 'linear' to be a LoRA" in refused.err


def test_npnet(run, monkeypatch, tmp_path):
    # The official files are of one size, which takes long; `NPNet` has tests of reading them.
    small = small_npnet()
    monkeypatch.setattr(NPNet, "from_single_file", {"sdxl.pth": small}.__getitem__)
    ran = run("convert", "npnet", "sdxl.pth", tmp_path / "npnet", "--json")
    network = NPNet.from_pretrained(tmp_path / "npnet")
    assert all(map(torch.equal, network.state_dict().values(), small.state_dict().values()))
    assert ran.facts["text_embed_dim"] == network.config.text_embed_dim == 128
    assert ran.facts["parameters"] == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora", "nowhere.safetensors", "out.safetensors", "--format", "kohya"], "nowhere"),
        (["lora", "{lora}", "out.bin", "--format", "kohya"], "must end in .safetensors"),
        (["eraser", "./nowhere", "out", "--format", "peft"], "no such folder"),
        (["eraser", "{lora}", "out", "--format", "peft"], "must hold adapter_config.json"),
        (["npnet", "nowhere.pth", "out"], "`source` must be a file with NPNet's weights"),
        (["npnet", "{lora}/pytorch_lora_weights.safetensors", "out"], "must be NPNet's"),
        (["npnet", "any.pth", __file__], "`destination` must be a folder"),
    ],
)
def test_bad_input_is_refused(run, hub, lora, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    ran = run("convert", *(word.replace("{lora}", str(lora)) for word in words))
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not list(tmp_path.iterdir())

"""Erasers written to folders."""

from __future__ import annotations

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors import safe_open

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.files import eraser_tensors, load_eraser, save_eraser
from diffusers_ext.eraser.formats import read_eraser
from tests.eraser.saved_erasers import make_eraser, run
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline
from tests.tiny_lora import add_random_lora

PEFT_FILES = ["adapter_config.json", "adapter_model.safetensors"]
LEGACY_FILES = ["eraser_config.json", "eraser_weights.pt"]


def test_what_is_in_the_files(tmp_path):
    transformer = make_eraser(tiny_transformer(), concept="seven")
    save_eraser(transformer, tmp_path, anchor_concept="digit", base_model_name_or_path="user/base")
    assert sorted(os.listdir(tmp_path)) == PEFT_FILES
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["peft_type"], facts["r"], facts["concept"]) == ("ERASER", 4, "seven")
    assert (facts["anchor_concept"], facts["base_model_name_or_path"]) == ("digit", "user/base")
    assert (facts["in_features"], facts["num_layers"]) == (32, 2)
    assert facts["inference_mode"] is True
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as handle:
        assert handle.metadata()["format"] == "pt"
        name = "base_model.model.transformer_blocks.1.attn1.to_out.1.eraser_down.weight"
        assert len(handle.keys()) == 8
        assert handle.get_tensor(name).shape == (4, 32)
    kept = transformer.peft_config["default"]
    assert (kept.anchor_concept, kept.base_model_name_or_path, kept.inference_mode) == (None, None, False)


@pytest.mark.parametrize(("format", "files"), [("peft", PEFT_FILES), ("legacy", LEGACY_FILES)])
def test_equal_erasers_are_equal_files(tmp_path, format, files):
    for name in ("one", "two"):
        save_eraser(make_eraser(tiny_transformer()), tmp_path / name, format=format)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_legacy_files_are_as_the_official_code_writes_them(tmp_path):
    transformer = make_eraser(tiny_transformer(num_layers=3), layers_to_transform=[0, 2])
    expected = run(transformer)
    save_eraser(transformer, tmp_path, format="legacy", dtype=torch.float32)
    assert json.loads((tmp_path / "eraser_config.json").read_text()) == {"eraser_type": "adapter", "eraser_rank": 4}
    tree = torch.load(tmp_path / "eraser_weights.pt", weights_only=True)
    assert list(tree) == [f"transformer_blocks.{i}.attn1.adapter" for i in range(3)]
    assert not any(value.any() for value in tree["transformer_blocks.1.attn1.adapter"].values())
    plain = tiny_transformer(num_layers=3)
    load_eraser(plain, tmp_path)
    assert torch.equal(run(plain), expected)


def test_one_of_several_from_a_pipeline_in_half_precision(tmp_path):
    pipeline = tiny_video_pipeline()
    add_random_lora(pipeline.transformer, adapter_name="lora")
    make_eraser(pipeline.transformer, "one")
    make_eraser(pipeline.transformer, "two", seed=2)
    with pytest.raises(ValueError, match=r"got None; it has \['one', 'two'\]"):
        save_eraser(pipeline, tmp_path)
    with pytest.raises(ValueError, match="must name an eraser .* got 'lora'"):
        save_eraser(pipeline, tmp_path, adapter_name="lora")
    save_eraser(pipeline, tmp_path, adapter_name="two", dtype=torch.bfloat16)
    saved = read_eraser(tmp_path).tensors
    for name, tensor in eraser_tensors(pipeline.transformer, "two").items():
        assert torch.equal(saved[name], tensor.to(torch.bfloat16))


def test_a_peft_model_saves_and_auto_model_finds_the_base(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "base")
    config = EraserConfig(r=4, init_weights=False)
    model = get_peft_model(tiny_transformer().from_pretrained(tmp_path / "base"), config)
    expected = run(model.eval())
    save_eraser(model, tmp_path / "eraser")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "eraser")
    assert torch.equal(run(loaded.eval()), expected)
    # PEFT's own files load as well.
    model.save_pretrained(tmp_path / "by-peft")
    transformer = tiny_transformer()
    load_eraser(transformer, tmp_path / "by-peft")
    assert torch.equal(run(transformer), expected)
    again = PeftModel.from_pretrained(tiny_transformer(), tmp_path / "eraser", is_trainable=True)
    assert sum(weight.requires_grad for weight in again.parameters()) == 8


def test_nothing_is_written_of_what_cannot_be_used(tmp_path):
    folder = tmp_path / "eraser"
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match="got None; it has none"):
        save_eraser(transformer, folder)
    make_eraser(transformer, init_weights=True)
    with pytest.raises(ValueError, match="must have an effect, got 'default' with zero"):
        save_eraser(transformer, folder)
    with pytest.raises(ValueError, match="`format` must be one of .* got 'pt'"):
        save_eraser(transformer, folder, format="pt")
    broken = make_eraser(tiny_transformer())
    next(iter(eraser_tensors(broken, "default").values())).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="'default': .*eraser_down.weight` must be finite"):
        save_eraser(broken, folder)
    large, small = (make_eraser(tiny_transformer()) for _ in range(2))
    for model, factor in ((large, 1e9), (small, 1e-9)):
        for name, weight in eraser_tensors(model, "default").items():
            weight.data.mul_(factor if "eraser_up" in name else 1)
    with pytest.raises(ValueError, match="'default' in torch.float16: .* must be finite"):
        save_eraser(large, folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="must have an effect"):
        save_eraser(small, folder, dtype=torch.float16)
    assert not folder.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        save_eraser(make_eraser(tiny_transformer()), tmp_path / "file")


def test_formats_are_not_mixed_in_one_folder(tmp_path):
    transformer = make_eraser(tiny_transformer())
    save_eraser(transformer, tmp_path)
    save_eraser(transformer, tmp_path)
    with pytest.raises(ValueError, match="must not hold an eraser of another format"):
        save_eraser(transformer, tmp_path, format="legacy")


def test_an_interrupted_save_leaves_the_old_eraser_or_none(tmp_path, monkeypatch):
    folder = tmp_path / "eraser"
    save_eraser(make_eraser(tiny_transformer()), folder)
    before = {name: (folder / name).read_bytes() for name in PEFT_FILES}
    replace = os.replace

    def stop(source, target):
        if str(target).endswith("adapter_config.json"):  # the second file
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_eraser(make_eraser(tiny_transformer(), concept="seven"), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    with pytest.raises(KeyboardInterrupt):
        save_eraser(make_eraser(tiny_transformer()), tmp_path / "new")
    assert os.listdir(tmp_path) == ["eraser"]


FACTS = {"base_model": "user/base", "license": "mit", "trained_on": "Two prompts."}


def test_only_the_eraser_is_uploaded_and_its_card(hub, tmp_path):
    (tmp_path / "named" / "checkpoint-1").mkdir(parents=True)
    transformer = make_eraser(tiny_transformer(), concept="seven")
    save_eraser(
        transformer, tmp_path / "named", push_to_hub=True, token="hf_test",
        preserved_concepts=["three"], **FACTS,
    )  # fmt: skip
    files = hub.files("tester/named")
    assert sorted(files) == ["README.md", *PEFT_FILES]
    card = files["README.md"].decode()
    assert "seven" in card
    assert "three" in card
    assert ModelCard(card).data.base_model == "user/base"
    other = tiny_transformer()
    load_eraser(other, "tester/named")
    assert run(other).equal(run(transformer))


def test_an_eraser_without_facts_is_not_uploaded(hub, tmp_path):
    transformer = make_eraser(tiny_transformer(), concept="seven")
    transformer.register_to_config(_name_or_path=str(tmp_path / "base-1" / "transformer"))
    with pytest.raises(ValueError, match="`preserved_concepts` must be given for the card"):
        save_eraser(transformer, tmp_path / "out", push_to_hub=True, **FACTS)
    with pytest.raises(TypeError, match="'license'. must come with `push_to_hub=True`"):
        save_eraser(transformer, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()
    assert not hub.repos
    facts = {"license": "mit", "trained_on": "Two prompts.", "preserved_concepts": []}
    save_eraser(transformer, tmp_path / "out", push_to_hub=True, format="legacy", **facts)
    card = hub.files("tester/out")["README.md"].decode()
    assert "base-1" in card
    assert str(tmp_path) not in card

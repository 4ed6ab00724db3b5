from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save

from diffusers_ext.core.artifacts import (
    Artifact,
    fingerprint,
    same_fingerprint,
    sealed,
    with_sorted_metadata,
    write_atomically,
)
from diffusers_ext.hub.card import make_card
from tests.tiny_lora import add_random_lora
from tests.tiny_models import pixart, sd_unet, sdxl_unet

FACTS = {
    "base_model": "user/base", "license": "mit", "trained_on": "Prompts.", "concept": "seven",
    "anchor_concept": "", "preserved_concepts": [], "pipeline": "CogVideoXPipeline",
    "parameters": 2,
}  # fmt: skip


class Scales(Artifact):
    """One named tensor and a number."""

    weights_name = "scales.safetensors"
    format_version = 2

    def __init__(self, values: torch.Tensor, rank: int = 3) -> None:
        self.values, self.rank = values, rank

    def _to_artifact(self):
        return {"rank": self.rank}, {"values": self.values}

    def _card(self, *, token, rank=None, **facts):
        known = {**FACTS, "rank": rank, **facts}
        return make_card("eraser", token=token, **known)

    @classmethod
    def _from_artifact(cls, config, tensors):
        assert set(config) == {"rank"}
        return cls(tensors["values"], config["rank"])


class OtherScales(Scales):
    """Another class with the same files."""


class Unfinished(Artifact):
    """A subclass that converts nothing."""


@pytest.fixture
def folder(tmp_path):
    Scales(torch.arange(6.0).reshape(2, 3)).save_pretrained(tmp_path / "scales")
    return tmp_path / "scales"


def edit_config(folder, **changes) -> None:
    """As somebody would who means it: without the config's own checksum."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config.pop("config_sha256", None)
    path.write_text(json.dumps(config))


def test_round_trip_is_exact(tmp_path, folder):
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64):
        values = torch.randn(4, 3).to(dtype).T
        Scales(values, rank=7).save_pretrained(tmp_path / "deep" / "folder")
        loaded = Scales.from_pretrained(tmp_path / "deep", subfolder="folder")
        assert (loaded.rank, loaded.values.dtype) == (7, dtype)
        assert torch.equal(loaded.values, values)
    assert sorted(os.listdir(folder)) == ["config.json", "scales.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["_class_name"], config["format_version"]) == ("Scales", 2)


def test_saving_again_replaces_and_repeats_to_the_byte(folder):
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    Scales.from_pretrained(folder).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    Scales(torch.zeros(2)).save_pretrained(folder)
    assert torch.equal(Scales.from_pretrained(folder).values, torch.zeros(2))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_truncated_or_altered_weights_are_refused(folder, damage):
    path = folder / "scales.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="must have SHA-256 .* it is truncated or was altered"):
        Scales.from_pretrained(folder)


def test_weights_that_are_no_safetensors_are_refused(folder):
    content = b"not tensors"
    (folder / "scales.safetensors").write_bytes(content)
    edit_config(folder, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ValueError, match=r"scales.safetensors must be a whole safetensors file, got"):
        Scales.from_pretrained(folder)


def test_truncated_config_is_refused(folder):
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"config.json must hold JSON, got"):
        Scales.from_pretrained(folder)


def test_incomplete_config_is_refused(folder):
    (folder / "config.json").write_text('{"_class_name": "Scales"}')
    with pytest.raises(ValueError, match=r"config.json must hold \['format_version', 'sha256'\]"):
        Scales.from_pretrained(folder)


def test_other_class_is_refused(folder):
    with pytest.raises(ValueError, match="must describe a OtherScales, got 'Scales'"):
        OtherScales.from_pretrained(folder)
    edit_config(folder, _class_name=None)
    with pytest.raises(ValueError, match="must describe a Scales, got None"):
        Scales.from_pretrained(folder)


def test_older_format_is_read_and_a_newer_one_refused(folder):
    saved = (folder / "config.json").read_bytes()
    edit_config(folder, format_version=1)
    assert Scales.from_pretrained(folder).rank == 3
    (folder / "config.json").write_bytes(saved)
    edit_config(folder, format_version=3)
    with pytest.raises(ValueError, match="must be at most 2, got 3 .* Update diffusers_ext"):
        Scales.from_pretrained(folder)


def test_checksums_cannot_be_switched_off(folder, subtests):
    (folder / "scales.safetensors").write_bytes(save({"values": torch.zeros(2, 3)}))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for value in ["", None, 0, "0" * 63, ["a"], "z" * 64]:
        for key in ["sha256", "config_sha256"]:
            with subtests.test(value=value, key=key):
                path.write_text(json.dumps({**config, key: value}))
                with pytest.raises(ValueError, match=rf"`{key}` must be a SHA-256 .*config\.json"):
                    Scales.from_pretrained(folder)


@pytest.mark.parametrize(("old", "new"), [('"rank": 3', '"rank": 4'), ('"rank"', '"rang"'), (": 2", ": 1")])
def test_any_change_of_a_config_is_found(folder, old, new):
    path = folder / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"config\.json must have the contents"):
        Scales.from_pretrained(folder)
    path.write_text(json.dumps(json.loads(text)))  # written in another way, with the same contents
    assert Scales.from_pretrained(folder).rank == 3


@pytest.mark.parametrize("version", [True, "1", 0, None, 1.0])
def test_a_format_is_a_number(folder, version):
    edit_config(folder, format_version=version)
    with pytest.raises(ValueError, match=r"`format_version` must be a positive integer.*config\.json"):
        Scales.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, "", "\x00", '{"a": 1'])
def test_a_config_of_another_form_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json must "):
        Scales.from_pretrained(folder)


def test_numbers_that_are_none_are_refused_whatever_the_checksum(folder):
    Scales(torch.tensor([1.0, float("nan")])).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"scales\.safetensors must hold finite numbers"):
        Scales.from_pretrained(folder)


def test_unknown_keywords_are_refused_for_a_local_folder(folder):
    with pytest.raises(TypeError, match=r"Scales.from_pretrained\(\) got .* 'typo'"):
        Scales.from_pretrained(folder, typo=1)


@pytest.mark.parametrize("name", ["config.json", "scales.safetensors"])
def test_what_is_no_file_is_refused(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"scales must hold {name}"):
        Scales.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "scales.safetensors"])
def test_missing_file_is_named_with_what_is_there(folder, name):
    (folder / name).unlink()
    (left,) = os.listdir(folder)
    with pytest.raises(ValueError, match=rf"scales must hold {name}, got \['{left}'\]"):
        Scales.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub():
    with pytest.raises(ValueError, match=r"must be a folder or 'user/name', got nowhere: no such"):
        Scales.from_pretrained("nowhere")


def test_missing_folders_are_told_from_missing_files(folder):
    with pytest.raises(ValueError, match=r"must be a folder or 'user/name', got .*no such folder"):
        Scales.from_pretrained(folder / "nowhere")
    with pytest.raises(ValueError, match=r"sub must hold config.json, got \[\]"):
        Scales.from_pretrained(folder, subfolder="sub")
    with pytest.raises(LocalEntryNotFoundError, match="local"):
        Scales.from_pretrained("user/name", local_files_only=True, cache_dir=folder)


def test_file_in_place_of_the_folder_is_an_error(folder):
    with pytest.raises(ValueError, match="`save_directory` must be a folder, got the file"):
        Scales(torch.ones(1)).save_pretrained(folder / "config.json")


def test_subclass_must_convert_itself(tmp_path, folder):
    with pytest.raises(TypeError, match="Unfinished must define `_to_artifact`"):
        Unfinished().save_pretrained(tmp_path)
    os.replace(folder / "scales.safetensors", folder / "model.safetensors")
    edit_config(folder, _class_name="Unfinished", format_version=1)
    with pytest.raises(TypeError, match="Unfinished must define `_from_artifact`"):
        Unfinished.from_pretrained(folder)


def test_upload_creates_the_repository_and_sends_the_artifact_with_its_card(hub, tmp_path):
    scales = Scales(torch.ones(2))
    address = scales.push_to_hub("name", private=True, token="hf_test", rank=3)
    assert "tester/name/commit/" in address
    assert hub.repos["tester/name"].private
    files = hub.files("tester/name")
    assert sorted(files) == ["README.md", "config.json", "scales.safetensors"]
    assert "tester/name" in ModelCard(files["README.md"].decode()).text
    assert Scales.from_pretrained("tester/name").values.equal(scales.values)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "diary.txt").write_text("mine")
    scales.save_pretrained(tmp_path / "named", push_to_hub=True, rank=3, commit_message="Add scales")
    assert sorted(hub.files("tester/named")) == ["README.md", "config.json", "scales.safetensors"]
    assert HfApi().list_repo_commits("tester/named")[0].title == "Add scales"


def test_an_upload_must_be_asked_for_and_be_described(hub, tmp_path):
    with pytest.raises(TypeError, match="'private'. must come with `push_to_hub=True`"):
        Scales(torch.ones(2)).save_pretrained(tmp_path / "new", private=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="`rank` must be given for the card, got None"):
        Scales(torch.ones(2)).push_to_hub("tester/name")
    with pytest.raises(TypeError, match="Unfinished must define `_card`"):
        Unfinished().push_to_hub("tester/name")
    assert not hub.repos


def test_written_file_is_whole_and_readable_by_all(tmp_path):
    write_atomically(tmp_path / "text", "é\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path)) == ["bytes", "text"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(monkeypatch, tmp_path, step, interruption):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def interrupt(*_):
        raise interruption("stop")

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(interruption, match="stop"):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_survives_dtype_json_and_lora(dtype):
    first = json.loads(json.dumps(fingerprint(sdxl_unet().model)))
    model = sdxl_unet().model
    add_random_lora(model)
    assert same_fingerprint(first, fingerprint(model.to(dtype)))
    assert same_fingerprint(fingerprint(model), first)


def test_fingerprint_tells_models_apart():
    first, other = sd_unet().model, sd_unet().model
    with torch.no_grad():
        other.mid_block.resnets[0].conv1.weight.mul_(1.02)
    assert same_fingerprint(fingerprint(first), fingerprint(sd_unet().model))
    assert not same_fingerprint(fingerprint(first), fingerprint(other))
    for stranger in (sdxl_unet().model, pixart().model):
        assert not same_fingerprint(fingerprint(first), fingerprint(stranger))


TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.int8)}
METADATA = {f"key {i}": f'värde "{i}" {{}}\n' for i in range(12)}


def test_equal_files_are_equal_bytes():
    contents = set()
    for _ in range(4):
        contents.add(sealed(TENSORS, METADATA))
    assert len(contents) == 1
    header = contents.pop()
    assert [header.index(key.encode()) for key in sorted(METADATA)] == sorted(
        header.index(key.encode()) for key in METADATA
    )


def test_nothing_is_lost(tmp_path):
    path = tmp_path / "file.safetensors"
    for metadata in (METADATA, None):
        path.write_bytes(with_sorted_metadata(save(TENSORS, metadata=metadata)))
        loaded = load_file(path)
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
        with safe_open(path, "pt") as handle:
            assert (handle.metadata() or {}) == (metadata or {})

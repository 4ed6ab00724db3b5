"""What of a folder goes to the Hub: its own files, without paths of this machine, and none twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_ext.hub.push import config_digest, path_inside, public_content, stale_files


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (tmp_path / "theirs" / "sub").mkdir(parents=True)
    (tmp_path / "theirs" / "sub" / "a").write_text("a")
    return tmp_path / "theirs"


def test_names_that_lead_elsewhere_are_refused(folder):
    for name in ("../secret", "sub/../../secret", f"{folder.parent}/secret", "sub/../sub/a"):
        with pytest.raises(ValueError, match="must name files below itself, got .*(secret|sub/a)"):
            path_inside(folder, name)


def test_links_out_of_the_folder_are_refused_and_those_within_followed(folder):
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "up").symlink_to("..")
    (folder / "in").symlink_to("sub/a")
    for name in ("out", "up/secret"):
        with pytest.raises(ValueError, match=rf"{name} must be a file below .* a link to .*secret"):
            path_inside(folder, name)
    assert path_inside(folder, "in").read_text() == path_inside(folder, "sub/a").read_text() == "a"
    assert not path_inside(folder, "loop").is_file()
    (folder.parent / "name").symlink_to(folder)  # whoever named the folder meant where it leads
    assert path_inside(folder.parent / "name", "sub/a").read_text() == "a"


def test_the_cache_of_the_hub_is_one_folder_unless_its_blobs_are_a_link(tmp_path):
    snapshot, blobs = (tmp_path / "models--u--m" / part for part in ("snapshots/1a", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("a")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    assert path_inside(snapshot, "config.json").read_text() == "a"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link to .*elsewhere/f00"):
        path_inside(snapshot, "config.json")


def test_paths_become_names_and_all_else_stays(tmp_path):
    model = tmp_path / "mödel"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    cached = str(tmp_path / "hub/models--user--name/snapshots/1a2b/vae")
    content = {
        "base": str(model), "unet": str(model / "unet"), "gone": [str(tmp_path / "gone")],
        "deep": {"cached": cached}, "hub": "user/name", "beside": "pictures/0.png",
    }  # fmt: skip
    kept = {"prompt": "/imagine a fox/or two", "slash": "/", "said": f'"{model}" it said', "é": 1.5}
    path = tmp_path / "training_report.json"
    for ascii_only in (True, False):
        text = json.dumps(content | kept, indent=3, ensure_ascii=ascii_only) + "\n"
        path.write_text(text, encoding="utf-8")
        found = public_content(path)
        assert json.loads(found) == kept | {
            "base": "mödel", "unet": "mödel", "gone": ["gone"], "deep": {"cached": "user/name"},
            "hub": "user/name", "beside": "pictures/0.png",
        }  # fmt: skip
        assert found.decode().splitlines()[-5:] == text.splitlines()[-5:]
        assert path.read_text(encoding="utf-8") == text


def test_a_checksum_of_the_config_fits_again_and_a_wrong_one_stays_wrong(tmp_path):
    config = {"base_model": str(tmp_path), "count": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"config_sha256": config_digest(config)}, indent=2))
    found = json.loads(public_content(path))
    assert found["base_model"] == tmp_path.name
    assert found["config_sha256"] == config_digest(found) != config_digest(config)
    path.write_text(json.dumps(config | {"config_sha256": "0" * 64}))
    assert json.loads(public_content(path))["config_sha256"] == "0" * 64


def test_other_files_are_left_alone(tmp_path):
    for name, content in (
        ("config.json", '{"a": "b"}'),
        ("adapter_config.json", "{broken"),
        ("report.json", b"\xff\xfe"),
        ("tokenizer.json", json.dumps({"path": str(Path(__file__))})),
    ):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert public_content(path) is None


SHARDS = ["unet/model-00001-of-00002.safetensors", "unet/model-00002-of-00002.safetensors"]
INDEX = "unet/model.safetensors.index.json"
OTHERS = [
    "README.md",
    "notes.txt",
    "model-00001-of-00002.safetensors",
    "unet/model.fp16-00001-of-00002.safetensors",
    "unet/model.safetensors.index.fp16.json",
    "unet/model-00001-of-00002.bin",
    "unet/my_model-00001-of-00002.safetensors",
    "unet/config.json",
]


def test_parts_of_the_same_weights_go():
    present = [*OTHERS, *SHARDS, INDEX]
    assert stale_files(present, {"unet/model.safetensors"}) == [*SHARDS, INDEX]
    single = [*OTHERS, "unet/model.safetensors"]
    assert stale_files(single, {*SHARDS, INDEX}) == ["unet/model.safetensors"]
    three = "unet/model-00001-of-00003.safetensors"
    assert stale_files([*OTHERS, three, SHARDS[0], INDEX], {*SHARDS, INDEX}) == [three]
    variant = {"unet/model.fp16.safetensors"}
    assert stale_files(present, variant) == OTHERS[3:5]


def test_other_files_stay():
    for new in ({"unet/config.json"}, {"vae/model.safetensors"}, set()):
        assert stale_files([*OTHERS, *SHARDS, INDEX], new) == []


def test_files_of_a_pattern_go_unless_they_are_written():
    present = ["a/1.json", "a/2.json", "b/2.json"]
    assert stale_files(present, {"a/1.json"}, ["a/*.json"]) == ["a/2.json"]

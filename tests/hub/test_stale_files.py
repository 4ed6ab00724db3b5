from __future__ import annotations

import pytest

from diffusers_ext.hub.push import push_folder
from diffusers_ext.hub.upload_files import stale_files
from tests.hub.test_push import ERASER, REPO


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


@pytest.mark.parametrize("new", [{"unet/config.json"}, {"vae/model.safetensors"}, set()])
def test_other_files_stay(new):
    assert stale_files([*OTHERS, *SHARDS, INDEX], new) == []


def test_files_of_a_pattern_go_unless_they_are_written():
    present = ["a/1.json", "a/2.json", "b/2.json"]
    assert stale_files(present, {"a/1.json"}, ["a/*.json"]) == ["a/2.json"]


def test_an_upload_deletes_them_in_its_own_commit_and_folder(hub, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, names in (
        (
            old,
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "7.bin", "note"],
        ),
        (new, ["model.safetensors", "config.json"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f'{{"name": "{folder / name}"}}')
    where = {"revision": "next", "private": True}
    push_folder(old, REPO, ERASER(), **where)
    push_folder(old, REPO, ERASER(), subfolder="a[b]", **where)
    before = hub.files(REPO, revision="next")
    pushed = {"subfolder": "a[b]", "delete_patterns": ["*.bin"], **where}
    address = push_folder(new, REPO, ERASER(), create_pr=True, **pushed)
    assert hub.files(REPO, revision="next") == before
    files = hub.files(REPO, revision=f"refs/pr/{address[-1]}")
    kept = {name for name in before if "[" not in name}
    assert files.keys() == kept | {
        f"a[b]/{n}" for n in ("config.json", "model.safetensors", "note")
    }
    assert files["a[b]/config.json"] == b'{"name": "config.json"}'
    push_folder(new, REPO, ERASER(), **pushed)
    assert hub.files(REPO, revision="next") == files
    assert "/commit/" in push_folder(new, REPO, ERASER(), create_pr=True, **pushed)
    assert not hub.files(REPO)

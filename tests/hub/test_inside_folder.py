"""What lies in a folder, and what only claims to."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_ext.hub.upload_files import path_inside


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (tmp_path / "theirs" / "sub").mkdir(parents=True)
    (tmp_path / "theirs" / "sub" / "a").write_text("a")
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "{}/secret", "sub/../sub/a"])
def test_names_that_lead_elsewhere_are_refused(folder, name):
    with pytest.raises(ValueError, match="must name files below itself, got .*(secret|sub/a)"):
        path_inside(folder, name.format(folder.parent))


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

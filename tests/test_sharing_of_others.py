"""Pushing somebody's folder: its report and its links choose nothing that is not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ext import push_artifact, save_eraser
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from tests.eraser.saved_erasers import make_eraser
from tests.tiny_cogvideox import tiny_transformer

CARD = {
    "base_model": "u/b", "license": "mit", "trained_on": "t", "instance_prompt": "x",
    "pipeline": "StableDiffusionPipeline", "directions": "null",
}  # fmt: skip


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A LoRA of somebody else, beside a file that is none of theirs."""
    (tmp_path / "secret_key").write_text("PRIVATE KEY")
    folder = tmp_path / "theirs"
    folder.mkdir()
    lora = {"unet.a.lora_A.weight": torch.ones(1, 4), "unet.a.lora_B.weight": torch.ones(4, 1)}
    save_file(lora, folder / LORA_WEIGHT_NAME)
    return folder


def report(folder: Path, **changes) -> None:
    (folder / "training_report.json").write_text(json.dumps({"card": CARD | changes}))


def test_a_pushed_folder_takes_no_files_from_outside(hub, theirs):
    (theirs / "link").symlink_to("../secret_key")
    for name in ("../secret_key", str(theirs.parent / "secret_key"), "link"):
        report(theirs, widget=[["x", name]])
        with pytest.raises(ValueError, match="secret_key"):
            push_artifact(theirs, "user/mine")
    assert not hub.repos


def test_a_report_says_nothing_about_the_upload(hub, theirs):
    for name in (
        "private", "token", "revision", "repo_id", "create_pr", "commit_message", "subfolder",
        "statistics", "allow_unfinished", "ignore_patterns", "lora", "source",
    ):  # fmt: skip
        report(theirs, **{name: True})
        with pytest.raises(ValueError, match=rf"report.json must hold facts .* got '{name}'"):
            push_artifact(theirs, "user/mine")
    assert not hub.repos


def test_facts_are_words_and_numbers(hub, theirs):
    for changes, message in (
        ({"widget": "a.png"}, "must hold pairs of prompt and file, got None"),
        ({"widget": [["a", 3]]}, "must hold pairs of prompt and file"),
        ({"settings": {"a": [1]}}, "`card.settings` .* must be words or numbers"),
        ({"trained_on": {"a": "b"}}, "`card.trained_on` .* must be words or numbers"),
        ({"instance_prompt": [["x"]]}, "`card.instance_prompt` .* must be words or numbers"),
    ):
        report(theirs, **changes)
        with pytest.raises(ValueError, match=message):
            push_artifact(theirs, "user/mine")
    (theirs / "training_report.json").write_text('{"card": []}')
    with pytest.raises(ValueError, match="training_report.json must be an object, got list"):
        push_artifact(theirs, "user/mine")
    assert not hub.repos


@pytest.mark.parametrize("name", [LORA_WEIGHT_NAME, "training_report.json", "statistics/config.json"])
def test_links_in_place_of_files_are_refused(hub, theirs, name):
    report(theirs)
    (theirs / name).parent.mkdir(exist_ok=True)
    if (theirs / name).exists():
        (theirs / name).rename(theirs.parent / "moved")
    else:
        (theirs.parent / "moved").write_text("{}")
    (theirs / name).symlink_to(theirs.parent / "moved")
    with pytest.raises(ValueError, match=rf"{name} must be a file below .* a link to .*moved"):
        push_artifact(theirs, "user/mine")
    assert not hub.repos


@pytest.mark.parametrize("name", ["README.md", "shown.png", "adapter_config.json"])
def test_no_file_of_an_upload_is_a_link_to_elsewhere(hub, tmp_path, name):
    (tmp_path / "secret_key").write_text("PRIVATE KEY")
    folder = tmp_path / "eraser"
    save_eraser(make_eraser(tiny_transformer(), concept="seven"), folder)
    if (folder / name).exists():
        (tmp_path / "secret_key").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
    (folder / name).symlink_to("../secret_key")
    with pytest.raises(ValueError, match=rf"{name} must be a file below .*secret_key"):
        push_artifact(
            folder, "user/mine", base_model="u/b", license="mit", trained_on="t",
            preserved_concepts=[], widget=[("x", "shown.png")],
        )  # fmt: skip
    assert not hub.repos

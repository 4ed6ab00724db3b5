from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.lora_files import read_lora


@pytest.fixture
def edit(run, digits, prompts, tmp_path):
    """Run `edit`."""

    def call(*words, **flags):
        usual = {
            "preserve": prompts,
            "output_dir": tmp_path / "edit",
            "pretrained_model_name_or_path": digits,
            "device": "cpu",
        }
        return run("edit", *words, **{**usual, **flags})

    return call


def test_the_files_are_those_of_the_library(edit, digits, tmp_path):
    ran = edit("three=nine", json=True)
    assert ran.code == 0
    assert ran.facts["edits"] == {"three": "nine"}
    written = load_file(tmp_path / "edit" / "pytorch_lora_weights.safetensors")
    expected = edit_concept(
        StableDiffusionPipeline.from_pretrained(digits), {"three": "nine"}, ["a red seven", "a blue three"]
    )
    assert written.keys() == expected.lora.keys()
    assert all(written[key].equal(expected.lora[key]) for key in written)
    assert read_lora(tmp_path / "edit" / "comfyui_a1111_kohya.safetensors").keys() == written.keys()
    report = json.loads((tmp_path / "edit" / "edit_report.json").read_text())
    assert report["layers"] == ran.facts["layers"]
    assert len(report["layers"]) == 14


def test_what_is_said(edit):
    ran = edit("three=nine", "one=")
    assert ran.code == 0
    assert "14 Linears that read text alone" in ran.out
    assert "Nothing was drawn." in ran.out


def test_an_anchor_is_found_among_the_preserved_concepts(edit, tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("a red three\na red nine\na blue one\n")
    ran = edit("three", preserve=path, json=True)
    assert ran.facts["edits"] == {"three": "nine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("three=nine", "three=one"), "`edits` must name each target once, got 'three' again."),
        (("=nine",), "`target` must be a word"),
        (("eight",), "must be given for 'eight', got None"),
    ],
)
def test_bad_edits_are_refused(edit, words, message):
    ran = edit(*words)
    assert ran.code == 1
    assert message in ran.err


def test_a_finished_result_is_not_replaced_unasked(edit):
    assert edit("three=nine").code == 0
    ran = edit("three=nine")
    assert ran.code == 1
    assert "--overwrite_output_dir" in ran.err

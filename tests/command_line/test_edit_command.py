from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.nullspace.edit import edit_concept


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


def test_of_several_processes_the_first_edits(edit, tmp_path, monkeypatch):
    assert edit("three=nine").code == 0
    monkeypatch.setenv("PMI_SIZE", "2")  # of mpirun; torch's names are known as well
    for rank in ("1", "0"):
        monkeypatch.setenv("PMI_RANK", rank)
        ran = edit("three=nine", output_dir=tmp_path / "launched")
        assert ran.code == 0
        assert (tmp_path / "launched").exists() == (rank == "0")
        assert ("`edit` is the work of one process: process 1 of 2 leaves it to the first." in ran.err) == (
            rank == "1"
        )
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "launched" / name).read_bytes() == (tmp_path / "edit" / name).read_bytes()


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


def test_an_edit_goes_on_from_earlier_ones(edit, tmp_path):
    first, path = tmp_path / "first", tmp_path / "known.txt"
    path.write_text("a red seven\na blue three\na red one\n")
    assert edit("three=seven", preserve=path, output_dir=first).code == 0
    ran = edit("seven=nine", preserve=path, earlier=first, json=True)
    assert ran.facts["edits"] == {"seven": "nine", "three": "nine"}
    assert json.loads((tmp_path / "edit" / "edit_report.json").read_text())["earlier"] == {"three": "seven"}
    missing = edit("seven=nine", earlier=tmp_path, output_dir=tmp_path / "other")
    assert (missing.code, "must hold edit_report.json" in missing.err) == (1, True)


def test_a_dry_run_tells_and_writes_nothing(edit, tmp_path):
    ran = edit("three=nine", dry_run=True)
    assert ran.code == 0
    assert "three is read as nine." in ran.out
    assert ran.out.endswith("Wrote nothing.\n")
    assert not (tmp_path / "edit").exists()


def test_a_mixture_and_a_table_of_prompts(edit, tmp_path):
    table = tmp_path / "known.csv"
    table.write_text("prompt,source\na red three,me\na red one,me\n")
    ran = edit("three=0.25 nine + 0.75 one", preserve=table, json=True)
    assert ran.facts["edits"] == {"three": "0.25 nine + 0.75 one"}
    (row,) = ran.facts["concepts"]
    assert (row["weights"], row["named"]) == ({"nine": 0.25, "one": 0.75}, ["a red three"])


def test_warnings_come_by_name_before_the_files(edit):
    ran = edit("six=nine", preserve_weight=1e-9)
    assert ran.code == 0
    for warning in ("No preserved prompt names 'six'", "Preserved concepts lie too near 'six'"):
        assert warning in ran.err
        assert warning in ran.out


def test_an_edit_is_pushed_with_its_card_and_again_from_its_folder(edit, run, hub, digits, tmp_path):
    facts = {"base_model": "tester/base", "license": "mit"}
    ran = edit("three=nine", push_to_hub=True, hub_model_id="tester/no-three", json=True, **facts)
    assert ran.facts["url"].startswith(hub.endpoint)
    files = hub.files("tester/no-three")
    names = {"README.md", "comfyui_a1111_kohya.safetensors", "edit_report.json", "pytorch_lora_weights.safetensors"}
    assert set(files) == names
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("tester/base", "mit")
    assert "| three | nine |" in card.text
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["share of the edit of 'three' that is achieved"] == ran.facts["concepts"][0]["achieved"]
    pipeline = StableDiffusionPipeline.from_pretrained(digits)
    pipeline.load_lora_weights("tester/no-three", weight_name="pytorch_lora_weights.safetensors")
    assert run("push", tmp_path / "edit", "tester/again", "--license", "mit").code == 0
    assert hub.files("tester/again")["edit_report.json"] == (tmp_path / "edit" / "edit_report.json").read_bytes()


def test_a_missing_licence_stops_an_upload_before_the_work(edit, hub, tmp_path):
    ran = edit("three=nine", push_to_hub=True)
    assert ran.code == 1
    assert "`--license` must be given" in ran.err
    assert not (tmp_path / "edit").exists()
    assert not hub.repos


def test_an_edit_is_evaluated_from_its_folder(edit, run, digits, tmp_path):
    assert edit("three=nine").code == 0
    usual = {"pretrained_model_name_or_path": digits, "edit": tmp_path / "edit", "output_dir": tmp_path / "eval"}
    quick = {"num_inference_steps": 2, "num_images_per_prompt": 1, "max_prompts": 2, "device": "cpu"}
    unseen = tmp_path / "unseen.txt"
    unseen.write_text("a drawing of a three in red\na drawing of a one in red\n")
    judge = "examples.digits.judge:DigitsJudge"
    ran = run("evaluate", "edit", json=True, unseen_prompts=unseen, judge=judge, **usual, **quick)
    assert ran.code == 0
    assert ran.facts["files"] == ["report.json", "sheet.png", "table.md"]
    assert set(ran.facts["summary"]) == {"target", "unseen", "preserved", "unseen_others"}
    assert ran.facts["summary"]["unseen"]["prompts"] == 1
    assert "target_read_tuned" in ran.facts["summary"]["target"]
    (tmp_path / "edit" / "edit_report.json").unlink()
    ran = run("evaluate", "edit", overwrite_output_dir=True, **usual, **quick)
    assert (ran.code, "must hold edit_report.json" in ran.err) == (1, True)


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


@pytest.mark.parametrize(
    ("word", "prompt", "message"),
    [
        ("three=THREE", "a one", "`anchor` must be read otherwise than `target`, got 'THREE' for 'three'"),
        ("caf\u00e9=nine", "a cafe\u0301", "no prompt that the model reads as one with the target 'caf\u00e9'"),
    ],
)
def test_what_cannot_be_edited_ends_before_anything_is_written(edit, tmp_path, word, prompt, message):
    path = tmp_path / "known.txt"
    path.write_text(f"{prompt}\na blue one\n", encoding="utf-8")
    ran = edit(word, preserve=path)
    assert (ran.code, message in ran.err) == (1, True), ran.err
    assert not (tmp_path / "edit").exists()


def test_edited_prompts_among_those_to_keep_are_counted_before_anything_is_written(edit, tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("a red three\nthree and five\na blue one\n")
    ran = edit("three=nine", "five=six", preserve=path, dry_run=True)
    assert "2 of the given ones among them because they name a target" in ran.out


def test_a_finished_result_is_not_replaced_unasked(edit):
    assert edit("three=nine").code == 0
    ran = edit("three=nine")
    assert ran.code == 1
    assert "--overwrite_output_dir" in ran.err

from __future__ import annotations

import logging

import pytest

from diffusers_ext.eraser.concepts import Neighbour, neighbouring_concepts
from diffusers_ext.training.eraser.prompts import (
    EraserPrompts,
    make_eraser_prompts,
    read_eraser_prompts,
    write_preserved_concepts,
)
from tests.tiny_cogvideox import tiny_video_pipeline

TARGET = ["a red seven moving right", "Seven in blue", "a red seven moving right"]


def test_text_files_have_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n# made by hand\n a, b \nc\na, b\n", encoding="utf-8-sig")
    assert read_eraser_prompts(path) == ["a, b", "c"]


@pytest.mark.parametrize(
    ("name", "text"), [("p.jsonl", '{"prompt": "a dog runs"}\n'), ("p.tsv", "id\tprompt\n1\ta dog runs\n")]
)
def test_other_formats_are_read_or_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_eraser_prompts(tmp_path / name) == ["a dog runs"]


def test_csv_files_have_columns(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('id,prompt,normal prompt\n1,"a, b",c\n2,# d,c\n')
    assert read_eraser_prompts(path) == ["a, b", "# d"]
    assert read_eraser_prompts(path, "normal prompt") == ["c"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "# nothing\n\n", "must hold at least one prompt, got .*a.txt with 2 lines"),
        ("a.csv", "", "must have the column 'prompt'"),
        ("a.csv", "prompt\n", "must hold at least one prompt"),
        ("a.txt", None, "no such file"),
        ("a.csv", None, "no such file"),
    ],
)
def test_files_without_prompts(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_eraser_prompts(tmp_path / name)


def test_anchors_and_preserved_prompts_follow_the_target():
    prompts = make_eraser_prompts(
        TARGET, "seven", anchor_concept="digit", preserved_concepts=["one", "two"], preserved_prompts=["a tree"]
    )
    assert prompts.target == TARGET[:2]
    assert prompts.anchor == ["a red digit moving right", "Digit in blue"]
    assert prompts.preserved == [
        "a red one moving right",
        "a red two moving right",
        "One in blue",
        "Two in blue",
        *prompts.anchor,
        "a tree",
    ]
    assert prompts.texts == ["", *prompts.target, *prompts.anchor, *prompts.preserved[:4], "a tree"]
    assert EraserPrompts(**prompts.facts) == prompts


def test_without_an_anchor_concept_the_anchor_is_the_empty_prompt():
    prompts = make_eraser_prompts([*TARGET, "a lucky number"], "seven", preserved_concepts=["one"])
    assert prompts.anchor == ["", "", ""]
    assert prompts.preserved == ["a red one moving right", "One in blue"]
    assert make_eraser_prompts(["x"], "seven").preserved == [""]


def test_prompts_that_do_not_name_the_concept(caplog):
    caplog.set_level(logging.WARNING)
    prompts = make_eraser_prompts(["a bare back"], "nudity", preserved_concepts=["person", "scene"])
    assert prompts.preserved == ["person", "scene"]
    assert "No target prompt names 'nudity'" in caplog.text
    with pytest.raises(ValueError, match="must contain 'nudity' as a whole word, got 'a bare back'"):
        make_eraser_prompts(["a bare back"], "nudity", anchor_concept="person")


def test_a_random_choice_of_the_preserved():
    def draw(seed: int) -> list[str]:
        concepts = ["one", "two", "three", "four", "five"]
        made = make_eraser_prompts(
            TARGET, "seven", preserved_concepts=concepts, anchor_concept="digit",
            max_preserved=3, seed=seed,
        )  # fmt: skip
        assert made.preserved[3:] == made.anchor
        return made.preserved[:3]

    assert draw(0) == draw(0)
    assert len(set(draw(0))) == 3
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": []}, "`target` must be a non-empty list"),
        ({"target": "a seven"}, "`target` must be a list of prompts, got the string"),
        ({"concept": " "}, "`concept` must be a word or a few words"),
        ({"anchor_concept": "lucky seven"}, "without 'seven' among them, got 'lucky seven'"),
        ({"preserved_concepts": ["one", "SEVEN"]}, "must not name 'seven', .* got 'SEVEN'"),
        ({"preserved_prompts": ["a red seven"]}, "`preserved_prompts` must not name 'seven'"),
        ({"target": ["x"], "preserved_prompts": ["x"]}, "share no prompt .* got 'x' in both"),
        ({"target": ["a seven", ""]}, "share no prompt .* got '' in both"),
    ],
)
def test_contradictions(options, message):
    options = {"target": TARGET, "concept": "seven", **options}
    with pytest.raises(ValueError, match=message):
        make_eraser_prompts(options.pop("target"), options.pop("concept"), **options)


def test_prompts_of_different_number():
    with pytest.raises(ValueError, match="one prompt for each target, got 1 for 2"):
        EraserPrompts(["a", "b"], [""], ["c"])
    with pytest.raises(ValueError, match="`preserved` must be a non-empty list"):
        EraserPrompts(["a"], [""], [])


def test_automatic_concepts_are_shown_and_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pipeline = tiny_video_pipeline()
    path = tmp_path / "made" / "preserved.txt"
    encoder = (pipeline.tokenizer, pipeline.text_encoder)
    near = neighbouring_concepts(*encoder, "seven", 3, max_sequence_length=12, exclude=["digit"])
    write_preserved_concepts(path, "seven", near)
    found = [neighbour.word for neighbour in near]
    assert len(set(found)) == 3
    assert read_eraser_prompts(path) == found
    assert not {"seven", "digit"} & set(found)
    assert f"{found[0]} 0." in caplog.text
    assert str(path) in caplog.text


def test_the_file_of_neighbours_keeps_their_order(tmp_path):
    path = tmp_path / "preserved.txt"
    write_preserved_concepts(path, "seven", [Neighbour("two", 0.9), Neighbour("eight", 0.25)])
    assert path.read_text().splitlines()[1:] == ["# Cosines: two 0.90, eight 0.25", "two", "eight"]
    assert "'seven'" in path.read_text().splitlines()[0]

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffusers_ext.nullspace.prompts import (
    check_prompt_length,
    check_prompts,
    preserved_texts,
    read_prompts_file,
    recombined,
    sub_phrases,
    unique,
)
from examples.digits.prompts import make_tokenizer
from tests.tiny_digits import random_digits_pipeline


def test_comments_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# known\n\n  a red café \r\n#a blue one\na red café\n".encode())
    assert read_prompts_file(path) == ["a red café", "a red café"]
    path.write_bytes("\ufeffa blue one".encode())
    assert read_prompts_file(str(path)) == ["a blue one"]


def test_missing_prompts_files_are_refused(tmp_path):
    for path, found in ((tmp_path / "none.txt", "no such"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=rf"`path` must be a text file .*, got {path}: {found}"):
            read_prompts_file(path)


def test_prompts_of_another_encoding_are_read_or_refused_by_name(tmp_path):
    (tmp_path / "u.txt").write_text("a red fox\n", encoding="utf-16")
    assert list(read_prompts_file(tmp_path / "u.txt")) == ["a red fox"]
    (tmp_path / "w.txt").write_bytes("a dog\u2019s life\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"w\.txt"):
        read_prompts_file(tmp_path / "w.txt")


@pytest.mark.parametrize(("content", "lines"), [("", 0), ("# a\n\n  \n", 3)])
def test_empty_prompts_files_are_refused(tmp_path, content, lines):
    (tmp_path / "prompts.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"at least one prompt, got .* with {lines} lines"):
        read_prompts_file(tmp_path / "prompts.txt")


def test_sub_phrases_leave_out_one_word_each():
    assert sub_phrases(["a red seven", "seven"]) == ["a red seven", "seven", "red seven", "a seven", "a red"]
    assert sub_phrases(["", "go go"]) == ["", "go go", "go"]


def test_recombined_prompts_begin_as_one_and_end_as_another():
    prompts = ["a photo of the red digit seven", "the number two in blue", "a blue one"]
    made = recombined(prompts, 500)
    assert made == recombined([*prompts, prompts[0]], 500) == unique(made)
    assert {"a photo of the two in blue", "the number seven"} <= {*made}
    beginnings = {" ".join(p.split()[:i]) for p in prompts for i in range(8)}
    ends = {" ".join(p.split()[i:]) for p in prompts for i in range(8)}
    for prompt in made:
        words = prompt.split()
        cuts = range(len(words) + 1)
        assert any(" ".join(words[:i]) in beginnings and " ".join(words[i:]) in ends for i in cuts)
        assert prompt not in prompts
        assert 0 < len(words) <= 7
    assert len(recombined(prompts, 1)) <= 3
    assert recombined(["dog"]) == recombined(prompts, 0) == []


def test_preserved_texts_are_prompts_parts_and_recombinations():
    prompts = ["a red seven", "the number two"]
    assert preserved_texts(prompts, 0) == sub_phrases(prompts)
    assert unique(preserved_texts(prompts)) == unique([*sub_phrases(prompts), *recombined(prompts, 5)])
    assert [preserved_texts(prompts).count(prompt) for prompt in prompts] == [3, 3]


def test_unique_keeps_the_first_order():
    assert unique(["b", "a", "b", ""]) == ["b", "a", ""]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a red seven", "`prompts` must be a list of prompts, got the string 'a red seven'"),
        ([], "`prompts` must be a non-empty list of strings, got none"),
        (["a", None], r"`prompts` must be a non-empty list of strings, got \[None\]"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts)


def test_lists_of_prompts_pass():
    assert check_prompts(("a", ""), "instance_prompts") == ["a", ""]
    with pytest.raises(ValueError, match="`instance_prompts` must be"):
        check_prompts([], "instance_prompts")


def test_prompts_longer_than_any_encoder_are_refused():
    longest = " ".join(["red"] * 14)  # 16 tokens with both ends
    short, long = make_tokenizer(), make_tokenizer()
    long.model_max_length = 20
    check_prompt_length(SimpleNamespace(tokenizer=short), [longest, ""])
    message = r"must fit the tokenizer \(16 tokens\), got 17 tokens in 'red .* Shorten it"
    with pytest.raises(ValueError, match=message):
        check_prompt_length(SimpleNamespace(tokenizer=short), ["", longest + " red"])
    check_prompt_length(SimpleNamespace(tokenizer=long, tokenizer_2=None), [longest + " red"])
    with pytest.raises(ValueError, match=r"must fit the tokenizer_2 \(16 tokens\)"):
        check_prompt_length(SimpleNamespace(tokenizer=long, tokenizer_2=short), [longest + " red"])


def test_the_vectors_of_a_textual_inversion_count():
    pipeline = random_digits_pipeline()
    vectors = torch.randn(14, pipeline.text_encoder.config.hidden_size)
    pipeline.load_textual_inversion({"<sks>": vectors}, token="<sks>")
    check_prompt_length(pipeline, ["<sks>"])  # 16 tokens with both ends
    with pytest.raises(ValueError, match="must fit the tokenizer .16 tokens., got 17 tokens in 'red <s"):
        check_prompt_length(pipeline, ["red <sks>"])

from __future__ import annotations

import pytest

from training.prompt_files import one_line, read_prompt_file


def test_line_breaks_become_spaces():
    assert one_line(" a\nb\r\nc\u2028d  e \n") == "a b c d  e"


def test_every_line_of_a_text_file_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("None\n\nNA\nnull\n# 1\n  a, b \n", encoding="utf-8-sig")
    assert read_prompt_file(path) == ["None", "NA", "null", "# 1", "a, b"]


def test_every_field_of_a_csv_column_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.CSV"
    path.write_text('id,prompt\n1,None\n2,NA\n\n3,"a, ""b""\nc"\n4,\n5,007\n')
    assert read_prompt_file(path) == ["None", "NA", 'a, "b" c', "007"]
    assert read_prompt_file(path, "id") == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "must hold at least one prompt, got none in .*a.txt"),
        ("a.csv", "", r"must have the column 'prompt', got \[\]"),
        ("a.csv", "text\na\n", r"must have the column 'prompt', got \['text'\]"),
        ("a.csv", "prompt\n", "must hold at least one prompt, got none in .*a.csv"),
        ("a.csv", "prompt\na\nb, c\n", "Line 3 of .* must have 1 fields .* got 2. Quote texts"),
        ("a.csv", "id,prompt\n1\n", "Line 2 of .* must have 2 fields like the header, got 1"),
    ],
)
def test_files_without_prompts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompt_file(tmp_path / name)


def test_a_missing_file():
    with pytest.raises(ValueError, match="got nowhere.txt: no such file"):
        read_prompt_file("nowhere.txt")

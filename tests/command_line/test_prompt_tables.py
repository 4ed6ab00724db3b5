from __future__ import annotations

import pytest

from diffusers_ext.command_line.prompt_tables import read_grouped_prompts, read_prompt_column


def test_every_line_of_a_text_file_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red nine\n\n# 1\r\nNone\n".encode())
    assert read_prompt_column(path) == ["a red nine", "# 1", "None"]


def test_a_column_of_a_csv_file(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('id,prompt,text\n1,"a red, nine",x\n2,,y\n3,NA,"two\nlines"\n')
    assert read_prompt_column(path) == ["a red, nine", "NA"]
    assert read_prompt_column(path, "text") == ["x", "y", "two lines"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\nx\n", r"must have the columns \['prompt'\], got \['text'\]"),
        ("", r"must have the columns \['prompt'\], got None"),
        ("prompt,id\na red, nine,1\n", "Line 2 of .* must have 2 fields"),
        ("prompt,id\na\n", "Line 2 of .* must have 2 fields"),
        ("prompt\n\n", "must hold at least one prompt"),
    ],
)
def test_broken_csv_files_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompt_column(path)


def test_missing_files_are_refused():
    with pytest.raises(ValueError, match="`prompt_file` must be .* got nowhere.txt: no such file"):
        read_prompt_column("nowhere.txt")
    with pytest.raises(ValueError, match="`evaluation_prompts` must be .* got nowhere.csv"):
        read_grouped_prompts("nowhere.csv")


def test_groups_and_seeds(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("seed,group,prompt\n4,target,a  dog\n,preserved,a cat\n,target,a puppy\n")
    found = read_grouped_prompts(path)
    assert found.groups == {"target": ["a dog", "a puppy"], "preserved": ["a cat"]}
    assert found.seeds == {"target": [4, None], "preserved": [None]}
    path.write_text("group,prompt\ntarget,a dog\n")
    assert read_grouped_prompts(path).seeds == {"target": [None]}


@pytest.mark.parametrize("row", [",target,", "a dog,,", "a dog,target,-1", "a dog,target,²"])
def test_rows_that_say_too_little_are_refused(tmp_path, row):
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt,group,seed\n{row}\n")
    with pytest.raises(ValueError, match="Row 1 of .* must have a prompt, a group and at most"):
        read_grouped_prompts(path)

from __future__ import annotations

import pytest

from diffusers_ext.command_line.prompt_tables import read_grouped_prompts, read_prompt_column


def test_every_text_of_a_file_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red nine\n\n# 1\r\nNone\n".encode())
    assert read_prompt_column(path) == ["a red nine", "# 1", "None"]
    path = tmp_path / "prompts.csv"
    path.write_text('id;prompt;text\n1;"a red; nine";x\n2;;y\n3;NA;"two\nlines"\n')
    assert read_prompt_column(path) == ["a red; nine", "NA"]
    assert read_prompt_column(path, "text") == ["x", "y", "two lines"]


def test_missing_files_are_refused():
    with pytest.raises(ValueError, match="`prompt_file` must be .* got nowhere.txt: no such file"):
        read_prompt_column("nowhere.txt")
    with pytest.raises(ValueError, match="`evaluation_prompts` must be .* got nowhere.csv"):
        read_grouped_prompts("nowhere.csv")


@pytest.mark.parametrize("row", [",target,", "a dog,,", "a dog,target,-1", "a dog,target,²"])
def test_rows_that_say_too_little_are_refused(tmp_path, row):
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt,group,seed\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Row 1 of .* must have a prompt, a group and at most"):
        read_grouped_prompts(path)

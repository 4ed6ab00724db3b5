from __future__ import annotations

import pytest

from diffusers_ext.training.golden_noise.rendering import read_prompt_file


def test_every_text_of_a_file_is_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("None\n\nNA\nnull\n# 1\n  a, b \n", "utf-8-sig")
    assert read_prompt_file(tmp_path / "prompts.txt") == ["None", "NA", "null", "# 1", "a, b"]
    (tmp_path / "prompts.csv").write_text('id,prompt\n1,None\n2,NA\n\n3,"a, ""b""\nc"\n4,\n5,007\n')
    assert read_prompt_file(tmp_path / "prompts.csv") == ["None", "NA", 'a, "b" c', "007"]
    assert read_prompt_file(tmp_path / "prompts.csv", "id") == ["1", "2", "3", "4", "5"]


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="`prompt_file` must be .*, got nowhere.txt: no such file"):
        read_prompt_file("nowhere.txt")
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"must have the column 'prompt', got \['text'\]"):
        read_prompt_file(tmp_path / "a.csv")

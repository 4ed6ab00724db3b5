from __future__ import annotations

import os

import pyarrow
import pytest
from pyarrow import parquet

from diffusers_ext.core import text_files
from diffusers_ext.core.text_files import (
    one_line,
    parse_json,
    read_grouped_prompts,
    read_json,
    read_prompt_texts,
    read_rows,
    read_text,
    read_yaml,
)
from diffusers_ext.nullspace.prompts import read_prompts_file
from diffusers_ext.training.eraser.prompts import read_eraser_prompts

TEXT = "a red fox\nein grüner Fuchs\n狐\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_honoured(tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "p.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT[:24].encode("cp1252"), "Line 2 of .*p.txt must be UTF-8, got the bytes fc 6e .*ein gr"),
        (b"\xef\xbb\xbfa\nb\x92s", "Line 2 of .*p.txt must be UTF-8, got the bytes 92 73 after 'b'"),
        ("a\nbc".encode("utf-16")[:-1], "Line 2 of .*p.txt must be UTF-16"),
        ("a\nb".encode("utf-16-le"), "Line 1 of .*p.txt must be text, got a NUL .*without its byte"),
        (b"PK\x03\x04\x14\0\6\0", "Line 1 of .*p.txt must be text, got a NUL"),
    ],
)
def test_other_encodings_are_refused_by_file_and_line(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.* Save .* UTF-8"):
        read_text(tmp_path / "p.txt")


def test_only_regular_files_below_a_size_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(text_files, "MAX_JSON_BYTES", 10)
    (tmp_path / "large.json").write_text(" " * 11)
    for name, rule in (("pipe.json", "a pipe"), ("", "a folder"), ("none.json", "No such file")):
        with pytest.raises(ValueError, match=rf"{name} must be a file, got:? {rule}"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="large.json must have at most 0 MiB"):
        read_json(tmp_path / "large.json")


def test_json_that_is_none_is_refused_by_name(tmp_path, subtests):
    for text, message in [
        ("[" * 100_000, "must be nested at most 100 deep"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "must be nested at most 100 deep"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "must hold JSON, got: the key 'b' twice in one object"),
        ('{"a": NaN}', "must hold JSON, got: the number NaN"),
        ('{"a": -Infinity}', "must hold JSON, got: the number -Infinity"),
        ('{"a": 1e999}', "must hold JSON, got: the number 1e999, which is too large"),
        ('{"a": "\\ud800"}', "must hold JSON, got: .*surrogates"),
        ('{"a": ' + "1" * 5000 + "}", "must hold JSON, got: Exceeds the limit"),
        ("[]", "must hold a JSON object, got a list"),
        ("{", "must hold JSON, got: Expecting"),
        ("", "must hold JSON, got: Expecting"),
    ]:
        with subtests.test(text=text, message=message):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ValueError, match=f"config.json {message}"):
                read_json(tmp_path / "config.json")


def test_json_of_all_types(tmp_path):
    (tmp_path / "a.json").write_bytes('{"ä": [1, 2.5, null, true, {"b": "c"}]}'.encode("utf-16"))
    assert read_json(tmp_path / "a.json") == {"ä": [1, 2.5, None, True, {"b": "c"}]}
    assert parse_json("[1]", "x", list) == [1]
    assert parse_json('"a"', "x", None) == "a"
    assert parse_json('{"a": Infinity}', "x", allow_nan=True) == {"a": float("inf")}
    with pytest.raises(ValueError, match="line 3 of x must hold a JSON list, got a dict"):
        parse_json(b"{}", "line 3 of x", list)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdef", "bcdefg")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 10)}]}}\n" for before, name in zip("abcdef", "bcdefg")
)


def test_yaml_that_cannot_be_meant_is_refused_by_name(tmp_path, subtests):
    for text, message in [
        ("[" * 100_000, "must be nested at most 100 deep"),
        ("a: " + "[" * 150 + "]" * 150, "must be nested at most 100 deep"),
        (BOMB, "must be a YAML file, got: more than 100000 values"),
        (MERGES, "must be a YAML file, got: more than 100000 values"),
        ("a: &a [*a]", "must be nested at most 100 deep"),
        ("a: 1\nb: {c: 1, c: 2}", "must be a YAML file, got: the key 'c' twice, in line 2"),
        ("a: 1" + ":1" * 1000, "must be a YAML file, got: the number 1:1:1"),
        ("a: .nan", "must be a YAML file, got: the number .nan in line 1"),
        ("a: !!timestamp x", "must be a YAML file, got: "),
        ("a: !!bool x", "must be a YAML file, got: "),
        ("a: !!python/object/apply:os.system [id]", "must be a YAML file, got: could not determine"),
        ("a: 2024-13-45", "must be a YAML file, got: month must be"),
        ("- a", "must be a YAML mapping, got list"),
        ("", "must be a YAML mapping, got NoneType"),
        ("a: [", "must be a YAML file, got: while parsing"),
        ("a: 1\n---\nb: 1", "must be a YAML file, got: expected a single document"),
    ]:
        with subtests.test(text=text, message=message):
            (tmp_path / "c.yaml").write_text(text)
            with pytest.raises(ValueError, match=f"c.yaml {message}"):
                read_yaml(tmp_path / "c.yaml")


def test_yaml_with_anchors(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: no}\nb: {<<: *a, x: 2}\nc: [é, 1.5]\n", "utf-16")
    expected = {"a": {"x": 1, "y": False}, "b": {"x": 2, "y": False}, "c": ["é", 1.5]}
    assert read_yaml(tmp_path / "c.yaml") == expected
    (tmp_path / "c.yaml").write_text("- a")
    with pytest.raises(ValueError, match="c.yaml must be a YAML mapping, got list"):
        read_yaml(tmp_path / "c.yaml")


def read(path, column: str = "prompt", comments: bool = False) -> list[str]:
    return read_prompt_texts(path, column, argument="prompt_file", comments=comments)


def test_line_breaks_become_spaces():
    assert one_line(" a\nb\r\nc\u2028d  e \n") == "a b c d  e"


def test_lines_of_text(tmp_path):
    for name in ("p.txt", "P.TXT", "p"):
        (tmp_path / name).write_bytes("\ufeffNone\r\n\n# 1\r  a, b \nc\u2028d".encode())
        assert read(tmp_path / name) == ["None", "# 1", "a, b", "c d"]
        assert read(tmp_path / name, comments=True) == ["None", "a, b", "c d"]


SAME = [
    ("p.csv", 'id,prompt,seed\n1,"a red, ""old""\nfox",3\n2,# b,\n\n3,,\n'),
    ("p.CSV", 'id;prompt;seed\r\n1;"a red, ""old""\r\nfox";3\r\n2;# b;\r\n3;;\r\n'),
    ("p.csv", 'id\tprompt\tseed\n1\t"a red, ""old""\nfox"\t3\n2\t# b\t\n3\t\t\n'),
    ("p.csv", 'sep=;\nid;prompt;seed\n1;"a red, ""old"" fox";3\n2;# b;\n'),
    ("p.csv", '"id";"prompt";"seed"\n"1";"a red, ""old"" fox";"3"\n"2";"# b";""\n'),
    ("p.tsv", 'id\tprompt\tseed\n1\ta red, "old" fox\t3\n2\t# b\t\n'),
    ("p.json", '[{"prompt": "a red, \\"old\\"\\nfox", "seed": 3}, {"prompt": "# b"}, {"prompt": null}]'),
    ("p.json", '{"prompt": ["a red, \\"old\\" fox", "# b"], "seed": [3, null], "n": 1}'),
    ("p.json", '{"prompt": "a red, \\"old\\" fox", "seed": 3}\n{"prompt": "# b"}\n'),
    ("p.jsonl", '\n{"prompt": "a red, \\"old\\" fox", "seed": 3.0}\n\n{"prompt": "# b", "seed": ""}'),
]


def test_tables_of_all_formats_give_the_same(tmp_path, subtests):
    for name, text in SAME:
        for encoding in ["utf-8-sig", "utf-16"]:
            with subtests.test(name=name, text=text, encoding=encoding):
                (tmp_path / name).write_bytes(text.encode(encoding))
                expected = ['a red, "old" fox', "# b"]
                assert read(tmp_path / name) == expected
                assert read_eraser_prompts(tmp_path / name) == expected
                assert read_prompts_file(tmp_path / name) == expected
                rows = [row for _, row in read_rows(tmp_path / name, ["prompt"], ["seed", "none"])]
                assert [(row["seed"], row["none"]) for row in rows[:2]] == [("3", ""), ("", "")]


def test_parquet_is_read_and_nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    table = {"prompt": ["a dog", None, "# b"], "seed": [1, None, 2], "image": [b"x"] * 3, "k": [[1]] * 3}
    for column in (table["prompt"], pyarrow.array(table["prompt"]).dictionary_encode()):
        parquet.write_table(pyarrow.table(table | {"prompt": column}), tmp_path / "p.parquet")
        assert read(tmp_path / "p.parquet") == ["a dog", "# b"]
        assert read(tmp_path / "p.parquet", "seed") == ["1", "2"]
    assert not (tmp_path / "home").exists()
    with pytest.raises(ValueError, match="'k' must be a text in row 1 of .*p.parquet, got"):
        read(tmp_path / "p.parquet", "k")
    with pytest.raises(ValueError, match="p.parquet must have the column 'text', got .*'seed'"):
        read(tmp_path / "p.parquet", "text")
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="p.parquet must be a whole parquet file, got"):
        read(tmp_path / "p.parquet")


def test_lists_of_texts(tmp_path):
    (tmp_path / "p.json").write_text('["a", "# b\\u2028c"]')
    (tmp_path / "p.jsonl").write_text('"a"\n"# b\u2028c"\n', encoding="utf-8")
    assert read(tmp_path / "p.json") == read(tmp_path / "p.jsonl") == ["a", "# b c"]


def test_what_is_no_table_of_prompts_is_refused(tmp_path, subtests):
    for name, text, message in [
        ("p.csv", "", r"p.csv must have the column 'prompt', got \[\]"),
        ("p.csv", "id;text\n1;a\n", r"must have the column 'prompt', got \['id', 'text'\]"),
        ("p.csv", "prompt,prompt\na,b\n", "must have the column 'prompt' once"),
        ("p.csv", "prompt\na, b\n", "Line 2 of .* must have 1 fields .* Quote texts that hold commas"),
        ("p.csv", "id;prompt\n1;a;b\n", "Line 2 of .* Quote texts that hold semicolons"),
        ("p.csv", 'prompt\na\n"b\nc\n', "The row from line 3 of .*p.csv must be CSV"),
        ("p.csv", 'sep=;\nprompt\na\n"b" c\n', "The row from line 4 of .*p.csv must be CSV"),
        ("p.csv", "prompt\n" + "a" * 200_000, "The row from line 2 of .*p.csv must be CSV"),
        ("p.tsv", "id,prompt\n1,a\n", r"must have the column 'prompt', got \['id,prompt'\]"),
        ("p.csv", "prompt\n\n", "`prompt_file` must hold at least one prompt, got none in .*p.csv"),
        ("p.txt", "\n \n", "must hold at least one prompt, got none in .*p.txt with 2 lines"),
        ("p.json", '{"a": 1}', r"must have the column 'prompt', got \[\]"),
        ("p.json", '"a"', "must hold a list of prompts or of objects, got a str"),
        ("p.json", "[[1]]", "item 1 of .*p.json must be a JSON object with .*'prompt'"),
        ("p.json", '[{"prompt": 1.5}]', "'prompt' must be a text in item 1 of .*p.json, got 1.5"),
        ("p.jsonl", '{"prompt": true}', "'prompt' must be a text in line 1 of .*p.jsonl, got True"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 of .*p.jsonl must have the column 'pro"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2 of .*p.jsonl must hold JSON"),
        ("p.jsonl", "[" * 9999, "line 1 of .*p.jsonl must be nested at most"),
        ("p.xlsx", "PK", "`prompt_file` must end in one of .txt.*p.xlsx.* Save a sheet as CSV in UTF-8"),
    ]:
        with subtests.test(name=name, text=text, message=message):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)


def test_what_is_no_file_is_refused(tmp_path):
    for path, found in ((tmp_path, "a folder or pipe"), (tmp_path / "none.txt", "no such file")):
        with pytest.raises(ValueError, match=f"`prompt_file` must be a text file .*: {found}"):
            read(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "seed,group,prompt\n4,target,a  dog\n,preserved,a cat\n,target,a puppy\n"),
        ("p.jsonl", '{"seed": 4, "group": "target", "prompt": "a dog"}\n{"group": "preserved", "prompt": '
                    '"a cat"}\n{"group": "target", "prompt": "a puppy"}'),
    ],
)  # fmt: skip
def test_groups_and_seeds(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    groups, seeds = read_grouped_prompts(tmp_path / name, "evaluation_prompts")
    assert groups == {"target": ["a dog", "a puppy"], "preserved": ["a cat"]}
    assert seeds == {"target": [4, None], "preserved": [None]}
    with pytest.raises(ValueError, match="`evaluation_prompts` must be a table of prompts"):
        read_grouped_prompts(tmp_path / "p.txt", "evaluation_prompts")


def test_rows_of_groups_that_say_too_little_are_refused(tmp_path):
    path = tmp_path / "prompts.csv"
    for row in (",target,", "a dog,,", "a dog,target,-1", "a dog,target,²"):
        path.write_text(f"prompt,group,seed\n{row}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="Row 1 of .* must have a prompt, a group and at most"):
            read_grouped_prompts(path, "evaluation_prompts")


def test_every_text_of_a_file_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red nine\n\n# 1\r\nNone\n".encode())
    assert read(path) == ["a red nine", "# 1", "None"]
    path = tmp_path / "prompts.csv"
    path.write_text('id;prompt;text\n1;"a red; nine";x\n2;;y\n3;NA;"two\nlines"\n')
    assert read(path) == ["a red; nine", "NA"]
    assert read_prompt_texts(path, "text", argument="prompt_file") == ["x", "y", "two lines"]

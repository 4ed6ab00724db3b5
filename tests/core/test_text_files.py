from __future__ import annotations

import os

import pytest

from diffusers_ext.core import text_files
from diffusers_ext.core.text_files import parse_json, read_json, read_text, read_yaml

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
    assert read_yaml(tmp_path / "c.yaml", list) == ["a"]

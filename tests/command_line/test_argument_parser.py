from __future__ import annotations

import argparse

import pytest

from diffusers_ext.command_line.main import main
from diffusers_ext.training.run.settings import OneLineParser, error_line


def make_parser() -> OneLineParser:
    parser = OneLineParser()
    parser.add_argument("--prompt_file")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--directions", choices=["generalized", "null"])
    parser.add_argument("--traceback", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--promt_file", "x"], "unrecognized arguments: --promt_file x. Did you mean '--prompt_file'?"),
        (["--promt_file=x"], "unrecognized arguments: --promt_file=x. Did you mean '--prompt_file'?"),
        (["--zzz"], "unrecognized arguments: --zzz."),
        (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--directions", "generalised"], "argument --directions: invalid choice: 'generalised'"),
        (["--directions", "generalised"], "Did you mean 'generalized'?"),
    ],
)  # fmt: skip
def test_a_wrong_line_ends_in_one_line(line, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert expected in said
    assert said.count("\n") == 1


def test_the_traceback_is_shown_on_request(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--rank", "x", "--traceback"])
    said = capsys.readouterr().err
    assert "in test_the_traceback" in said
    assert said.endswith("error: argument --rank: invalid int value: 'x'\n")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("evalute forgetting", "'evaluate'"),
        ("evaluate erasur", "'erasure'"),
        ("debleed a --statistic b", "'--statistics'"),
        ("plan eraser --memory_gb 24", "'--memory_gib'"),
    ],
)
def test_the_console_finds_what_was_meant(line, meant, capsys):
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert f"Did you mean {meant}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`prompt_file` must be a file, got p.txt.", "`--prompt_file` must be a file, got p.txt."),
        ("`source` must be it with `rank`.", "`source` must be it with `--rank`."),
        ("`model` must be a folder, got 'stats': none.", "`--statistics` must be a folder, got 'stats': none."),
        ("`rank` must be a folder, got stats: none.", "`--statistics` must be a folder, got stats: none."),
        ("`model` must be a folder, got stats2.", "`model` must be a folder, got stats2."),
        ("Give\n`damping`  or not.", "Give `damping` or not."),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_errors_name_flags(message, expected):
    args = argparse.Namespace(prompt_file="p.txt", source="a", rank=2, statistics="stats", lora=["l"])
    flags = {name: f"--{name}" for name in vars(args)} | {"source": "source"}
    assert error_line(ValueError(message), args, flags) == expected


def test_a_systems_error_names_the_file():
    error = OSError(28, "No space is left for out", "out")
    assert error_line(error, argparse.Namespace(), {}) == "No space is left for out: out"

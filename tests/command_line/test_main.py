from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

import diffusers_ext
from diffusers_ext.command_line import main as main_module
from diffusers_ext.command_line.main import COMMANDS, build_parser, main
from diffusers_ext.command_line.options import Command, Outcome
from diffusers_ext.command_line.train import TRAININGS

ROOT = Path(__file__).parents[2]


def own_command(run) -> Command:
    """A command of this test that does what it is told."""
    return Command("try", "tries", "Tries.", ("try",), lambda parser: None, run)


@pytest.fixture
def try_command(run, monkeypatch):
    """Run a function as the command `try`."""

    def call(function, *flags):
        monkeypatch.setattr(main_module, "COMMANDS", (own_command(function),))
        return run("try", *flags)

    return call


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_the_commands_are_those_that_the_project_promises():
    assert {command.name.split()[0] for command in COMMANDS} == {
        "plan", "collect", "merge", "debleed", "interference", "edit", "evaluate", "convert", "push", "demo",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_examples_that_parse(run, command):
    shown = run(*command.name.split(), "--help")
    assert shown.code == 0
    unbroken = shown.out.replace(" \\\n     ", "")
    assert command.examples
    for example in command.examples:
        assert f"  diffusers-ext {example}\n" in unbroken
        parsed = build_parser().parse_args(shlex.split(example))
        assert parsed.command is command
    for flag in ("--json", "--quiet", "--traceback"):
        assert flag in shown.out


@pytest.mark.parametrize("words", [[], ["plan"], ["evaluate"], ["convert"]])
def test_help_of_groups_lists_their_commands(run, words):
    shown, names = run(*words, "--help"), [command.name for command in COMMANDS]
    assert shown.code == 0
    depth = len(words)
    below = {name.split()[depth] for name in names if name.split()[:depth] == words}
    assert below
    for name in below:
        assert re.search(rf"^    {name}(?: |$)", shown.out, re.MULTILINE)


def test_every_flag_is_in_snake_case_and_explained_where_it_is_required():
    for parser in parsers(build_parser()):
        for action in parser._actions:
            flags = [flag.strip("-").removeprefix("no-") for flag in action.option_strings]
            assert not [flag for flag in flags if "-" in flag]
            if action.required and not isinstance(action, argparse._SubParsersAction):
                assert action.help or action.choices, action.dest


def test_version(run):
    assert run("--version") == (0, f"diffusers-ext {diffusers_ext.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["convert"], "required: WHAT"),
        (["collect"], "the following arguments are required: .*--output_dir"),
        (["plan", "eraser", "--pretrained", "x"], "required: --pretrained_model_name_or_path"),
        (["debleed", "edit", "x", "--statistics", "y", "--output_path", "z", "--rank", "1",
          "--energy", "0.1"], "--energy: not allowed with argument --rank"),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_and_nothing_on_stdout(run, words, message):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert re.search(message, ran.err)


def test_stdout_holds_the_outcome_alone(try_command):
    def chatty(args) -> Outcome:
        print("from a library")
        logging.getLogger("diffusers_ext.nullspace.collect").info("a log")
        return Outcome({"folder": Path("a/b"), "number": 1.5}, "done")

    assert try_command(chatty) == (0, "done\n", "from a library\na log\n")
    ran = try_command(chatty, "--json")
    assert ran.facts == {"folder": "a/b", "number": 1.5}
    quiet = try_command(chatty, "--quiet")
    assert "a log" not in quiet.err


def test_quiet_silences_the_libraries_and_everything_comes_back(try_command):
    logger = logging.getLogger("diffusers_ext")
    levels = logger.level, list(logger.handlers), diffusers_logging.get_verbosity()
    hub_level = hub_logging.get_verbosity()
    bars = are_progress_bars_disabled(), diffusers_logging.is_progress_bar_enabled()
    seen = []

    def look(args) -> Outcome:
        warnings.warn("look here", UserWarning, stacklevel=1)
        seen.append((are_progress_bars_disabled(), diffusers_logging.is_progress_bar_enabled()))
        diffusers_logging.get_logger("diffusers.x").warning("look there")
        hub_logging.get_logger("huggingface_hub.x").warning("Retrying")
        raise ValueError("`x` must be 1,\n  got 2.")

    assert try_command(look, "--quiet") == (1, "", "error: `x` must be 1, got 2.\n")
    assert seen == [(True, False)]
    assert levels == (logger.level, logger.handlers, diffusers_logging.get_verbosity())
    assert hub_level == hub_logging.get_verbosity()
    assert bars == (are_progress_bars_disabled(), diffusers_logging.is_progress_bar_enabled())


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), FileNotFoundError("no"), ImportError("no")])
def test_errors_of_the_user_are_one_line(try_command, error):
    def fail(args) -> Outcome:
        raise error

    assert try_command(fail) == (1, "", "error: no\n")
    ran = try_command(fail, "--json", "--traceback")
    assert ran.code == 1
    assert ran.facts == {"error": {"type": type(error).__name__, "message": "no"}}
    assert ran.err.startswith("Traceback")
    assert ran.err.endswith("error: no\n")


def test_an_error_without_words_is_named(try_command):
    def fail(args) -> Outcome:
        raise FileNotFoundError

    assert try_command(fail).err == "error: FileNotFoundError\n"


def test_defects_keep_their_traceback(try_command):
    with pytest.raises(KeyError, match="missing"):
        try_command(lambda args: {}["missing"])


def test_interruption(try_command):
    def interrupted(args) -> Outcome:
        raise KeyboardInterrupt

    assert try_command(interrupted) == (130, "", "interrupted\n")


def test_exit_code_of_an_outcome(try_command):
    assert try_command(lambda args: Outcome({}, "no", 3)).code == 3


HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "numpy", "PIL"}


def test_help_of_the_module_comes_before_any_heavy_library():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "diffusers_ext.command_line", "--help"],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout.startswith("usage: diffusers-ext")
    assert "diffusers_ext.command_line.main" in imported
    assert not HEAVY & imported


def test_help_a_first_command_and_what_the_package_adds_to_diffusers_and_peft(tmp_path, lora):
    """Sets of modules in a fresh process: they say what takes time, on any machine."""
    commands = [*(c.name.split() for c in COMMANDS), *(["train", name] for name in TRAININGS)]
    lines = [[], ["--help"], ["--version"], *([*words, "--help"] for words in commands)]
    convert = ["convert", "lora", str(lora), str(tmp_path / "x.safetensors"), "--format", "kohya"]
    code = f"""
import contextlib, io, json, sys
sys.argv[0] = "/somewhere/bin/diffusers-ext"
from diffusers_ext.command_line.main import main
codes = [main(line) for line in {lines}]
heavy = sorted({HEAVY} & set(sys.modules))
import diffusers, httpx, peft  # diffusers below 0.40 takes the second with its pipelines
before = set(sys.modules)
import diffusers_ext
diffusers_ext.register()
added = sorted(set(sys.modules) - before)
known = [
    "diffusers_ext" in diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES,
    "ERASER" in peft.PeftType.__members__,
]
with contextlib.redirect_stderr(io.StringIO()) as told:
    codes.append(main({convert}))
print(json.dumps([codes, heavy, added, known, told.getvalue()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=280, check=True, cwd=ROOT,
    )  # fmt: skip
    codes, heavy, added, known, told = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2, *[0] * len(lines)]
    assert heavy == []
    assert known == [True, True]
    slow = r"diffusers\.(pipelines|models|loaders)\.\w+\.|transformers\.models|scipy|datasets|PIL"
    assert [name for name in added if re.match(slow, name)] == []
    assert len(added) < 100  # of some 3,000
    assert told == ""


def test_other_packages_are_quiet_and_own_warnings_are_shown(try_command):
    levels = diffusers_logging.get_verbosity(), hub_logging.get_verbosity()

    def look(args) -> Outcome:
        warnings.warn_explicit("of theirs", UserWarning, "torch/x.py", 1, module="torch.x")
        diffusers_logging.get_logger("diffusers.x").warning("in float32")
        transformers_logging.get_logger("transformers.x").warning("requires torchvision")
        with pytest.warns(UserWarning, match="of ours"):
            warnings.warn_explicit("of ours", UserWarning, "x.py", 1, module="diffusers_ext.x")
        return Outcome({}, "done")

    assert try_command(look) == (0, "done\n", "")
    assert levels == (diffusers_logging.get_verbosity(), hub_logging.get_verbosity())


def test_a_training_begins_registered_and_other_packages_are_quiet(monkeypatch):
    seen = []

    def look(name, words) -> int:
        seen.append((name, words, registered, diffusers_logging.get_verbosity()))
        return 3

    monkeypatch.setattr(main_module, "train", look)
    registered = []
    monkeypatch.setattr(diffusers_ext, "register", lambda: registered.append(1))
    level = diffusers_logging.get_verbosity()
    assert main(["train", "noise", "--seed", "1"]) == 3
    assert seen == [("noise", ["--seed", "1"], [1], logging.ERROR)]
    assert diffusers_logging.get_verbosity() == level


def test_the_entry_point_is_there():
    assert "diffusers-ext = diffusers_ext.command_line.main:main" in (ROOT / "setup.cfg").read_text()
    assert callable(main)

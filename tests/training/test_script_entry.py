from __future__ import annotations

import errno
import os
import runpy
import subprocess
import sys

import pytest

from diffusers_ext.training.run import script as script_entry
from diffusers_ext.training.run.script import run_script
from tests.training.script_runs import REPOSITORY, environment
from training.evaluate_golden_noise import GOLDEN_NOISE, main, parse_args

LINE = (
    "--pretrained_model_name_or_path", "m", "--prompt_file", "p.txt", "--reward", "hpsv2",
    "--target_steps", "1", "--output_dir",
)  # fmt: skip


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, fresh_accelerator):
    """Run the script's entry; returns its exit code and what it said on stderr."""

    def run(*flags, then=main):
        monkeypatch.setattr(sys, "argv", ["script.py", *LINE, str(tmp_path / "out"), *flags])
        with pytest.raises(SystemExit) as stop:
            run_script(parse_args, then, GOLDEN_NOISE.settings_class)
        return stop.value.code, capsys.readouterr().err

    return run


def test_a_wrong_value_is_one_line_that_names_the_flag(script):
    code, said = script("--batch_size", "0")
    assert (code, said) == (2, "error: `--batch_size` must be at least 1, got 0.\n")
    code, said = script("--batch_sise", "2")
    assert code == 2
    assert said == "error: unrecognized arguments: --batch_sise 2. Did you mean '--batch_size'?\n"


def test_the_traceback_is_shown_on_request(script):
    code, said = script("--batch_size", "0", "--traceback")
    assert code == 2
    assert said.startswith("Traceback")
    assert said.endswith("error: `--batch_size` must be at least 1, got 0.\n")


def test_a_full_disk_is_one_line_that_names_the_path(script):
    def full(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{args.output_dir}/report.json")

    code, said = script(then=full)
    assert code == 2
    assert said.count("\n") == 1
    assert "No space left" in said
    assert "out/report.json" in said


def test_defects_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script.py", *LINE, str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        run_script(parse_args, lambda args: 1 / 0)


def test_other_processes_speak_late_and_by_their_number(script, monkeypatch):
    waited = []
    monkeypatch.setattr(script_entry.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    code, said = script("--batch_size", "0")
    assert code == 2
    assert said.startswith("[process 1] error: `--batch_size`")
    code, said = script("--batch_sise", "0")
    assert "Did you mean" in said
    assert len(waited) == 2


def test_a_script_as_its_users_start_it(tmp_path):
    line = [sys.executable, "-W", "ignore", "training/evaluate_nullspace.py", "--lora", "x"]
    run = subprocess.run(line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    said, _, missing = run.stderr.splitlines()[-1].partition("given: ")
    assert said == "error: these arguments must be "
    assert set(missing.split(", ")) == {
        "--pretrained_model_name_or_path", "--knowledge_prompts", "--output_dir",
    }  # fmt: skip
    assert "usage" not in run.stderr


def test_scripts_find_the_repository_from_any_folder(subtests, monkeypatch, tmp_path):
    """Also what a flag names there, such as `examples.digits.rewards:DigitsReward`."""
    monkeypatch.chdir(tmp_path)
    scripts = [p for p in (REPOSITORY / "training").glob("*.py") if "run_script(" in p.read_text()]
    assert len(scripts) == 14
    for script in scripts:
        with subtests.test(script=script.name):
            monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(REPOSITORY)])
            runpy.run_path(str(script))
            assert str(REPOSITORY) in sys.path

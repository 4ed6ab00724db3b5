from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_ext.core.artifacts import LOCK_NAME, folder_lock

HOLDER = """
import sys
sys.path.insert(0, {repository!r})
sys.argv[0] = "diffusers-ext"  # as on the console, without diffusers and PEFT
from diffusers_ext.core.artifacts import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left(tmp_path):
    with folder_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).is_file()
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "result"]


def test_it_is_free_again_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path):
        raise KeyboardInterrupt
    with folder_lock(tmp_path):
        pass


def test_a_second_run_is_told_which_one_is_there(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(ValueError, match=f"one run at a time, got .* process {os.getpid()} on"):
            with folder_lock(tmp_path):
                pass
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), folder_lock(tmp_path):
            pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = HOLDER.format(repository=str(Path(__file__).resolve().parents[2]))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"), folder_lock(tmp_path):
            pass
        process.kill()
    assert (tmp_path / LOCK_NAME).is_file()
    with folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match="`output_dir` must be a folder, got .*/f"):
        with folder_lock(tmp_path / "f"):
            pass

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_ext.command_line import demo as command
from examples.demo import PARTS

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
print("first pictures", flush=True)
print("a warning", file=sys.stderr)
(folder / "eraser").mkdir(parents=True)
(folder / "report.html").write_text(" ".join(sys.argv[1:]))
(folder / "eraser" / "table.md").write_text("| a |")
sys.exit(CODE)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Let the command run this script in place of the demo; called with its exit code."""

    def write(code: int = 0) -> None:
        path = tmp_path / "demo.py"
        path.write_text(SCRIPT.replace("CODE", str(code)))
        monkeypatch.setattr(command, "demo_script", lambda: path)

    return write


def test_the_script_of_the_checkout_has_the_parts_that_are_offered():
    assert command.demo_script() == ROOT / "examples" / "demo.py"
    assert command.PARTS == PARTS


def test_flags_go_to_the_script_and_its_words_to_stderr(run, script, tmp_path):
    script()
    folder = tmp_path / "out"
    ran = run("demo", "--json", output_dir=folder, parts=["eraser", "new_glyph"], processes=1)
    assert ran.code == 0
    assert "first pictures" in ran.err
    assert ran.facts == {
        "output_dir": str(folder), "page": str(folder / "report.html"), "tables": ["eraser/table.md"],
    }  # fmt: skip
    line = f"--output_dir {folder} --parts eraser new_glyph --processes 1"
    assert (folder / "report.html").read_text() == line
    ran = run("demo", output_dir=folder)
    assert ran.code == 1
    assert "--overwrite_output_dir" in ran.err


def test_quiet_says_where_the_page_is_alone(run, script, tmp_path):
    script()
    ran = run("demo", "--quiet", output_dir=tmp_path / "out")
    assert (ran.code, ran.out) == (0, f"Wrote {tmp_path / 'out' / 'report.html'}\n")
    assert "first pictures" not in ran.err


def test_a_demo_that_fails_is_no_success(run, script, tmp_path):
    script(code=3)
    ran = run("demo", output_dir=tmp_path / "out")
    assert ran.code == 1
    assert "ended with exit code 3" in ran.out


def test_what_is_refused(run, monkeypatch, tmp_path):
    assert "`--processes` must be at least 1, got 0." in run("demo", processes=0, output_dir=tmp_path).err
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "sklearn" else name)
    ran = run("demo", output_dir=tmp_path)
    assert ran.code == 1
    assert "got no sklearn: pip install 'diffusers_ext[demo]'" in ran.err
    monkeypatch.setattr(command, "_PLACES", (tmp_path,))
    ran = run("demo", output_dir=tmp_path)
    assert ran.code == 1
    assert f"must find its script in {tmp_path}" in ran.err

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_ext.core.result_folder import RESULT_LIST, check_no_file, check_no_result, remove_result, staged_output


def contents(folder: Path) -> dict[str, str]:
    """All files but the list of the result's."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RESULT_LIST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def write(folder: Path, *names: str, text: str = "new") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def finish(folder: Path, *names: str, text: str = "new", **options) -> None:
    with staged_output(folder, **options) as staging:
        write(staging, *names, text=text)


def test_a_finished_result_is_refused_by_name(tmp_path):
    check_no_result(tmp_path / "none", ["report.json"])
    finish(tmp_path / "out", "weights", "plots/a")
    with pytest.raises(ValueError, match="`output_dir` must hold no finished result, got plots/a in"):
        check_no_result(tmp_path / "out")
    write(tmp_path / "older", "report.json")
    check_no_result(tmp_path / "older")
    with pytest.raises(ValueError, match="got report.json in .* Pass `--overwrite_output_dir`"):
        check_no_result(tmp_path / "older", ["report.json"])


def test_what_is_gone_or_half_written_is_no_result(tmp_path, monkeypatch):
    finish(tmp_path / "gone", "a")
    (tmp_path / "gone" / "a").unlink()
    check_no_result(tmp_path / "gone")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("diffusers_ext.core.result_folder.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path / "half", "a")
    check_no_result(tmp_path / "half")


def test_a_new_result_takes_the_place_of_the_whole_old_one(tmp_path):
    finish(tmp_path, "weights", "pipeline/unet/a", "sheet.png", text="old")
    write(tmp_path, "mine.txt", "pipeline/notes", text="mine")
    finish(tmp_path, "weights", "lora")
    assert contents(tmp_path) == {
        "weights": "new", "lora": "new", "mine.txt": "mine", "pipeline/notes": "mine",
    }  # fmt: skip
    assert not (tmp_path / "pipeline" / "unet").exists()


def test_what_a_run_wrote_on_the_way_belongs_to_its_result(tmp_path):
    write(tmp_path, "validation/step-1", "validation/mine")
    finish(tmp_path, "a", beside=["validation/step-*"])
    finish(tmp_path, "a", beside=["validation/step-*"])
    assert "validation/step-1" in contents(tmp_path)
    finish(tmp_path, "a")
    assert contents(tmp_path).keys() == {"a", "validation/mine"}


def test_a_result_is_removed_without_what_is_not_its_own(tmp_path):
    finish(tmp_path, "a", "plots/b", "plots/c")
    write(tmp_path, "plots/mine", "old/b", "old/c")
    remove_result(tmp_path, ["old/b"])
    assert contents(tmp_path).keys() == {"plots/mine", "old/c"}
    assert not (tmp_path / RESULT_LIST).exists()


@pytest.mark.parametrize("listed", [["../kept"], ["/kept"], "kept", [None], [""], None, ["a", "b/../../kept"]])
def test_a_list_never_removes_files_elsewhere(tmp_path, listed):
    write(tmp_path, "kept", "out/a")
    (tmp_path / "out" / RESULT_LIST).write_text(json.dumps({"complete": True, "files": listed}))
    remove_result(tmp_path / "out")
    finish(tmp_path / "out", "b")
    assert contents(tmp_path) == {"kept": "new", "out/a": "new", "out/b": "new"}


def test_files_are_replaced_on_request_alone(tmp_path):
    check_no_file(tmp_path / "a", False)
    write(tmp_path, "a")
    check_no_file(tmp_path / "a", True)
    with pytest.raises(ValueError, match="`output_path` must be a new file, got .*/a, which is there"):
        check_no_file(tmp_path / "a", False)

from __future__ import annotations

from pathlib import Path

import pytest

from training.output_folder import staged_output


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder: Path, *names: str, text: str = "new") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_files_appear_at_the_end(tmp_path):
    output_dir = tmp_path / "deep" / "out"
    with staged_output(output_dir) as folder:
        write(folder, "a", "plots/b")
        assert contents(output_dir).keys() == {".partial-output/a", ".partial-output/plots/b"}
    assert contents(output_dir) == {"a": "new", "plots/b": "new"}
    assert sorted(path.name for path in output_dir.iterdir()) == ["a", "plots"]


def test_older_files_are_replaced_or_kept(tmp_path):
    write(tmp_path, "a", "plots/old", text="old")
    with staged_output(tmp_path) as folder:
        write(folder, "a", "plots/b")
    assert contents(tmp_path) == {"a": "new", "plots/old": "old", "plots/b": "new"}


def fail_after_writing(output_dir: Path, error: type[BaseException], last: str = "") -> None:
    with staged_output(output_dir, last=[last]) as folder:
        write(folder, "a", "plots/b")
        raise error


def test_nothing_is_left_of_a_failed_block(tmp_path):
    with pytest.raises(OSError):  # noqa: PT011
        fail_after_writing(tmp_path / "new", OSError)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, "a", text="old")
    with pytest.raises(KeyboardInterrupt):
        fail_after_writing(tmp_path, KeyboardInterrupt, last="a")
    assert contents(tmp_path) == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_remains_of_a_killed_run_do_not_get_in(tmp_path):
    write(tmp_path, ".partial-output/of_the_killed")
    with staged_output(tmp_path) as folder:
        write(folder, "a")
    assert contents(tmp_path) == {"a": "new"}


def test_the_last_file_is_missing_while_others_move(tmp_path, monkeypatch):
    write(tmp_path, "config", "weights", text="old")
    moves = []
    monkeypatch.setattr(
        "training.output_folder.os.replace",
        lambda source, target: moves.append((target.name, "config" in contents(tmp_path))),
    )
    with staged_output(tmp_path, last=["config"]) as folder:
        write(folder, "config", "plots/p", "weights")
    assert moves == [("plots", False), ("weights", False), ("config", False)]

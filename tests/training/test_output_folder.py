from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from diffusers_ext.core.artifacts import LOCK_NAME
from diffusers_ext.training.run.script import check_output_dir, clear_output_dir, one_run_a_folder, staged_output


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and ".result.json" not in path.name
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
    assert sorted(path.name for path in output_dir.iterdir()) == [
        ".result.json", "a", "plots",
    ]  # fmt: skip


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
        "diffusers_ext.core.result_folder.os.replace",
        lambda _, target: moves.append((target.name, "config" in contents(tmp_path))),
    )
    with staged_output(tmp_path, last=["config"]) as folder:
        write(folder, "config", "plots/p", "weights")
    moves = [move for move in moves if move[0] != ".result.json"]
    assert moves == [("plots", False), ("weights", False), ("config", False)]


def trained(folder: Path, **given) -> Namespace:
    return Namespace(**{"output_dir": folder, "overwrite_output_dir": False, "resume_from_checkpoint": None} | given)


def test_a_finished_training_is_not_replaced_unasked(tmp_path):
    write(tmp_path, "training_report.json", "checkpoint-2/run.json")
    with pytest.raises(ValueError, match="no finished result, got training_report.json .*train it fu"):
        check_output_dir(trained(tmp_path))
    check_output_dir(trained(tmp_path, resume_from_checkpoint="latest"))
    check_output_dir(trained(tmp_path, overwrite_output_dir=True))


def test_a_report_takes_no_models_place(tmp_path):
    write(tmp_path, "training_report.json")
    evaluation = Namespace(output_dir=tmp_path, overwrite_output_dir=True)
    with pytest.raises(ValueError, match="must not hold a trained model"):
        check_output_dir(evaluation)


def test_an_earlier_training_is_removed_as_a_whole_on_request(tmp_path):
    mine = ["mine.txt", "checkpoint-x/run.json", "validation/mine.png", "logs/events"]
    write(tmp_path, *mine, "validation/step-1.png", "checkpoint-2/run.json")
    write(tmp_path, "pytorch_lora_weights.safetensors", "statistics/config.json")
    write(tmp_path, "training_report.json")
    clear_output_dir(trained(tmp_path))
    clear_output_dir(trained(tmp_path, overwrite_output_dir=True, resume_from_checkpoint="latest"))
    assert "checkpoint-2/run.json" in contents(tmp_path)
    clear_output_dir(trained(tmp_path, overwrite_output_dir=True))
    assert contents(tmp_path).keys() == set(mine)


def test_files_of_no_training_stay(tmp_path):
    write(tmp_path, "config.json", "pytorch_lora_weights.safetensors")
    clear_output_dir(trained(tmp_path, overwrite_output_dir=True))
    assert len(contents(tmp_path)) == 2


def test_of_several_processes_the_first_one_holds_the_folder(tmp_path, monkeypatch):
    held = one_run_a_folder(lambda args: Path(args.output_dir, LOCK_NAME).exists())
    args = Namespace(output_dir=tmp_path / "out")
    assert held(args)
    monkeypatch.setenv("RANK", "1")
    assert not held(args)
    assert not args.output_dir.exists()

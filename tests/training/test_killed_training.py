"""Trainings that are killed at awkward moments, and what `--resume_from_checkpoint` makes of them."""

from __future__ import annotations

import json

import pytest

from diffusers_ext.training.nullspace.run import main, parse_args
from diffusers_ext.training.run.checkpoint_files import list_checkpoints
from tests.training.conftest import reset_accelerator
from tests.training.script_runs import files_below

# Everything that has a state: dropout draws from the global generators, the schedule counts steps.
STATEFUL = {
    "lora_dropout": 0.3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 12,
    "logging_steps": 3,
}
SCRIPT = "train_nullspace_dreambooth"
PATCH = """
import time
from pathlib import Path

import diffusers_ext.training.run.checkpoint_files as folders
from diffusers_ext.training.nullspace import subject
from diffusers_ext.training.run import checkpoints

calls = []

def stop_at(call):
    calls.append(call)
    if len(calls) == call:
        Path({marker!r}).touch()
        time.sleep(600)

"""
STOPS = {
    "a checkpoint is complete but for its name": """
flush = folders.flush_folder
folders.flush_folder = lambda folder: (stop_at(2), flush(folder))
""",
    "the weights of a checkpoint are half written": """
save = checkpoints.save_file
def save_half(tensors, path):
    save(tensors, path)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    stop_at(3)
    save(tensors, path)
checkpoints.save_file = save_half
""",
    "an old checkpoint is half removed": """
remove = folders.shutil.rmtree
def remove_half(folder, **options):
    if Path(folder).exists():
        sorted(Path(folder).iterdir())[0].unlink()
        stop_at(2)
    remove(folder, **options)
folders.shutil.rmtree = remove_half
""",
    "the result is half written": """
save = subject.save_lora
def save_half(pipeline_class, unet, directory, **facts):
    Path(directory, "pytorch_lora_weights.safetensors").write_bytes(b"half")
    stop_at(1)
subject.save_lora = save_half
""",
}


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def result_of(folder) -> dict:
    """All that a training leaves, without what differs between two runs of one command."""
    report = json.loads((folder / "training_report.json").read_text())
    del report["arguments"], report["seconds"]
    names = files_below(folder) - {"training_report.json"}
    kept = {name for name in names if not name.startswith("checkpoint-")}
    return {"report": report, **{name: (folder / name).read_bytes() for name in kept}}


WATCHED = {**STATEFUL, "checkpointing_steps": 2, "checkpoints_total_limit": 2}


@pytest.fixture(scope="module")
def whole(line_to, tmp_path_factory) -> dict:
    """What a run leaves that nothing stopped."""
    reset_accelerator()
    folder = main(parse_args(line_to(tmp_path_factory.mktemp("whole") / "out", **WATCHED)))
    reset_accelerator()
    return result_of(folder)


@pytest.mark.parametrize("moment", STOPS)
def test_killed_while(moment, whole, server, teach, subject_line, tmp_path):
    run = WATCHED
    marker = tmp_path / "stopped"
    patch = PATCH.format(marker=str(marker)) + STOPS[moment]
    server.kill_when(SCRIPT, subject_line("killed", **run), marker.exists, patch)
    killed = tmp_path / "killed"
    assert not (killed / "pytorch_lora_weights.safetensors").exists()
    assert any(path.name.startswith(".partial-") for path in killed.iterdir())
    resumed = teach("killed", **run, resume_from_checkpoint="latest")
    assert result_of(resumed) == whole
    assert [folder.name for folder in list_checkpoints(killed)] == ["checkpoint-10", "checkpoint-12"]
    assert not any(path.name.startswith(".partial-") for path in killed.iterdir())


@pytest.mark.parametrize(
    ("step", "method"),
    [(1, {"directions": "soft"}), (7, {"full_finetune": True, "lora_dropout": 0.0})],
    ids=["soft", "full"],
)
def test_killed_between_two_steps(step, method, server, teach, subject_line, tmp_path):
    run = {**STATEFUL, **method, "checkpointing_steps": 1}
    expected = teach("whole", **run)
    seen = (tmp_path / "killed" / f"checkpoint-{step}").exists
    server.kill_when(SCRIPT, subject_line("killed", **run), seen)
    assert not (tmp_path / "killed" / "training_report.json").exists()
    resumed = teach("killed", **run, resume_from_checkpoint="latest")
    assert result_of(resumed) == result_of(expected)


def test_every_checkpoint_leads_to_the_same_result(teach, tmp_path):
    drawing = {"validation_prompt": "a red seven", "validation_steps": 4}
    run = {**STATEFUL, **drawing, "checkpointing_steps": 4, "resolution": 32}
    expected = teach("whole", **run)
    for step in (4, 8, 12):
        checkpoint = expected / f"checkpoint-{step}"
        resumed = teach(f"from_{step}", **run, resume_from_checkpoint=checkpoint)
        result, whole = result_of(resumed), result_of(expected)
        pictures = [f"validation/step-{drawn:06d}-prompt-0.png" for drawn in (4, 8, 12)]
        # Pictures of the checkpoint's own step are drawn again, those before it are not.
        assert result == {k: v for k, v in whole.items() if k not in pictures[: step // 4 - 1]}


def test_a_finished_run_can_be_made_longer(teach, tmp_path):
    run = {"checkpointing_steps": 2, "lora_dropout": 0.3}
    expected = teach("whole", **run, max_train_steps=6)
    teach("longer", **run, max_train_steps=4)
    longer = teach("longer", **run, max_train_steps=6, resume_from_checkpoint="checkpoint-4")
    assert result_of(longer) == result_of(expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-2}, "`learning_rate` must be the same .* it was 0.03, got 0.01"),
        ({"rank": 2}, "`rank` must be the same .* it was 1, got 2"),
        ({"eps": 1e-3}, "`eps` must be the same"),
        ({"random_flip": True}, "`random_flip` must be the same .* it was False, got True"),
        ({"instance_prompt": "a sks"}, "`instance_prompt` must be the same .* got 'a sks'"),
        ({"max_train_steps": 3}, "`max_train_steps` must be at least the 4 steps"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "must name a complete .*'checkpoint-4'"),
    ],
)  # fmt: skip
def test_another_run_is_refused_before_the_model_is_loaded(
    teach, subject_line, tmp_path, monkeypatch, changed, message
):
    teach(checkpointing_steps=4)
    before = contents(tmp_path / "out")
    forbid_loading(monkeypatch)
    arguments = {"checkpointing_steps": 4, "resume_from_checkpoint": "latest", **changed}
    with pytest.raises(ValueError, match=message):
        main(parse_args(subject_line(**arguments)))
    assert contents(tmp_path / "out") == before


def test_other_pictures_or_prompts_are_refused(teach, tmp_path, pictures, knowledge):
    teach(checkpointing_steps=4)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "0.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(ValueError, match="`pictures` must be the same"):
        teach(resume_from_checkpoint="latest", instance_data_dir=fewer)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(knowledge.read_text().replace("blue", "green"))
    message = "`knowledge.prompts.1` must be the same .* 'a blue three', got 'a green three'"
    with pytest.raises(ValueError, match=message):
        teach(resume_from_checkpoint="latest", knowledge_prompts=prompts)


def test_a_truncated_checkpoint_is_refused(teach, subject_line, tmp_path, monkeypatch):
    weights = teach(checkpointing_steps=4) / "checkpoint-4" / "trained_0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    forbid_loading(monkeypatch)
    with pytest.raises(ValueError, match="trained_0.safetensors is truncated or altered"):
        main(parse_args(subject_line(resume_from_checkpoint="latest")))


def forbid_loading(monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("The model must not be loaded.")

    monkeypatch.setattr("diffusers_ext.training.nullspace.run.load_pipeline", load)

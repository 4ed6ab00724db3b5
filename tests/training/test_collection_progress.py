from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from accelerate import Accelerator

from diffusers_ext.training.nullspace.knowledge import check_resume, collection_facts, collection_progress
from diffusers_ext.training.nullspace.statistics import check_args, parse_args
from tests.training.script_runs import MODEL_DIR, PROMPTS, command_line, files_below


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def make_args(tmp_path):
    prompts_file = tmp_path / "knowledge.txt"
    prompts_file.write_text("\n".join(PROMPTS))

    def make(**arguments) -> argparse.Namespace:
        arguments = {"knowledge_prompts": prompts_file, "output_dir": tmp_path / "out", **arguments}
        args = parse_args(command_line(**arguments))
        check_args(args)
        return args

    return make


def facts_of(args: argparse.Namespace, prompts=PROMPTS, processes: int = 1) -> dict:
    return collection_facts(args, list(prompts), processes)


def collect(args, accelerator, error: type[BaseException] | None = None, batches: int = 0) -> Path:
    """A stand-in for a collection that saves some totals and then ends or fails."""
    with collection_progress(args, facts_of(args), accelerator) as folder:
        if batches:
            (folder / "part-0-of-1" / f"batches-{batches}").mkdir(parents=True)
            (folder / "part-0-of-1" / f"batches-{batches}" / "config.json").write_text("{}")
        if error is not None:
            raise error
    return folder


RUN, TOTALS = "progress/run.json", "progress/part-0-of-1/batches-8/config.json"


def test_progress_goes_with_the_end(make_args, accelerator, tmp_path):
    collect(make_args(), accelerator, batches=8)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "batches", "left"),
    [
        (KeyboardInterrupt, 8, {RUN, TOTALS}),
        (RuntimeError, 8, {RUN, TOTALS}),
        (RuntimeError, 0, None),
        (ValueError, 8, None),
    ],
)
def test_what_is_left_of_a_failure(make_args, accelerator, tmp_path, error, batches, left):
    with pytest.raises(error):
        collect(make_args(), accelerator, error, batches)
    if left is None:
        assert not (tmp_path / "out").exists()
    else:
        assert files_below(tmp_path / "out") == left


def test_an_existing_folder_is_not_removed(make_args, accelerator, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError):  # noqa: PT011
        collect(make_args(), accelerator, ValueError)
    assert list((tmp_path / "out").iterdir()) == []


def stop(make_args, accelerator, **arguments) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(make_args(**arguments), accelerator, KeyboardInterrupt, batches=8)


def test_a_new_run_removes_the_progress_of_a_stopped_one(make_args, accelerator, tmp_path, caplog):
    stop(make_args, accelerator)
    with pytest.raises(KeyboardInterrupt):
        collect(make_args(seed=1), accelerator, KeyboardInterrupt, batches=16)
    assert "--resume_from_checkpoint latest would continue it" in caplog.text
    assert TOTALS not in files_below(tmp_path / "out")


def test_a_resumed_run_keeps_the_progress(make_args, accelerator, tmp_path, caplog):
    stop(make_args, accelerator)
    args = make_args(resume_from_checkpoint="latest")
    check_resume(args, facts_of(args))
    with pytest.raises(ValueError):  # noqa: PT011
        collect(args, accelerator, ValueError)
    assert files_below(tmp_path / "out") == {RUN, TOTALS}
    assert "Removing" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"features": ["q"]}, "features.0"),
        ({"cross_attention_layers": [0]}, "cross_attention_layers"),
        ({"seed": 3}, "seed"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"num_inference_steps": 3}, "num_inference_steps"),
        ({"negative_prompt": "a red one"}, "negative_prompt"),
        ({"mixed_precision": "bf16"}, "mixed_precision"),
    ],
)
def test_progress_of_other_settings_is_refused(make_args, accelerator, tmp_path, arguments, name):
    stop(make_args, accelerator)
    args = make_args(resume_from_checkpoint="latest", **arguments)
    with pytest.raises(ValueError, match=f"`{name}` must be the same to continue .*it was"):
        check_resume(args, facts_of(args))
    assert files_below(tmp_path / "out") == {RUN, TOTALS}


def test_other_prompts_processes_or_models_are_refused(make_args, accelerator):
    stop(make_args, accelerator)
    args = make_args(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="`knowledge_prompts` must be the same"):
        check_resume(args, facts_of(args, PROMPTS[1:]))
    with pytest.raises(ValueError, match="`num_processes` must be the same .*was 1, got 2"):
        check_resume(args, facts_of(args, processes=2))
    args.pretrained_model_name_or_path = str(MODEL_DIR / "unet")
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be the same"):
        check_resume(args, facts_of(args))


def test_nothing_to_continue(make_args, tmp_path):
    args = make_args(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="got 'latest' but .* Start without the flag"):
        check_resume(args, facts_of(args))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds none. It holds finished statistics"):
        check_resume(args, facts_of(args))
    args.resume_from_checkpoint = "checkpoint-3"
    with pytest.raises(ValueError, match="must be 'latest' for statistics, got 'checkpoint-3'"):
        check_resume(args, facts_of(args))
    args.resume_from_checkpoint = None
    check_resume(args, facts_of(args))

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffusers_ext.evaluation.erasure_report import ErasureReport
from tests.tiny_clip import save_tiny_clip
from tests.tiny_cogvideox import tiny_image_to_video_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline
from tests.training.erasure_runs import save_base_and_erasers
from tests.training.script_runs import MODEL_DIR, command_line, files_below
from training import evaluate_eraser as script

EMPTY, TARGET = "empty", "target.csv"  # a folder, and prompts without preserved ones
JUDGE = "tests.training.erasure_runs:RedJudge"
DRAWING = {"num_inference_steps": 1, "num_frames": 9, "height": 16, "width": 16,
           "sampling_guidance_scale": 2.0, "sampling_batch_size": 3}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path]]:
    return save_base_and_erasers(tmp_path_factory.mktemp("models"))


@pytest.fixture
def evaluate(tmp_path, models, fresh_accelerator):
    """Run the script in this process; returns its report."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,group,seed\na red seven,target,4\nred two,preserved,\n7,words,1\n")

    def run(name: str = "out", **arguments) -> ErasureReport:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        usual = {"pretrained_model_name_or_path": models[0], "eraser": models[1][0],
                 "evaluation_prompts": prompts, "judge": JUDGE, "output_dir": tmp_path / name,
                 **DRAWING}  # fmt: skip
        usual.update(arguments)
        erasers = usual.pop("eraser")
        line = command_line(**usual)
        for eraser in erasers if isinstance(erasers, list) else [erasers]:
            line += ["--eraser", str(eraser)]
        return script.main(script.parse_args(line))

    return run


def test_the_files_hold_the_report(evaluate, tmp_path, models):
    report = evaluate(scale=[0.0, 1.0], kept_clips=1)
    folder = tmp_path / "out"
    assert {name for name in files_below(folder) if not name.startswith("clips/")} == {
        "report.json", "clips.csv", "table.md", "sheet.png",
    }  # fmt: skip
    assert len(list((folder / "clips").iterdir())) == 9  # three groups, three sides
    assert ErasureReport.from_json(folder / "report.json") == report
    assert [row["seed"] for row in report.rows][::2] == [4, 1]
    assert report.settings["concept_aspect"] == "red"
    assert report.settings["judge"] == {"name": "red", "version": "2"}
    assert report.settings["eraser"] == [str(models[1][0])]
    assert all(row["scale 0/drift"] == 0 < row["scale 1/drift"] for row in report.rows)


def test_two_erasers_and_clip(evaluate, tmp_path, models):
    report = evaluate(
        eraser=models[1],
        judge="clip",
        judge_model=save_tiny_clip(tmp_path / "clip"),
        classes=["seven", "two"],
        target_concept="seven",
        kept_clips=0,
    )
    assert len(report.settings["erasers"]) == 2
    assert report.settings["judge"]["classes"] == ["seven", "two"]
    assert report.settings["judge"]["version"] == "clip"
    assert report.groups["words"]["rates"]["erased"].keys() == {"concept"}  # "7" is no class
    assert files_below(tmp_path / "out") == {"report.json", "clips.csv", "table.md"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eraser": EMPTY}, ValueError, "must hold .*adapter_config.json"),
        ({"judge": "nothing"}, ValueError, "`judge` must be `module:attribute`"),
        ({"judge": "tests.training.erasure_runs:silent_judge"}, ValueError, "give a dictionary"),
        ({"judge": "nudenet"}, ImportError, "must have the package `nudenet`"),
        ({"clip_format": "mp4"}, ImportError, "mp4 must have"),
        ({"concept_aspect": "digit"}, ValueError, "`concept_aspect` must be one of"),
        ({"pretrained_model_name_or_path": EMPTY}, ValueError, "folder or Hub name"),
        ({"evaluation_prompts": "nowhere.csv"}, ValueError, "must be a table of prompts"),
        ({"evaluation_prompts": TARGET}, ValueError, r"got none of \['preserved'\] in target.csv"),
        ({"first_frames_dir": EMPTY}, ValueError, "`first_frames_dir` must be None for a model that draws"),
        ({"eraser": []}, ValueError, "`eraser` must be given at least once"),
        ({"judge": "clip"}, ValueError, "`classes` and `target_concept` must be given for `--judge"),
        ({"num_videos_per_prompt": 0}, ValueError, "`num_videos_per_prompt` must be at least 1"),
        ({"num_frames": 0}, ValueError, "`num_frames` must be at least 1, got 0"),
        ({"kept_clips": -1}, ValueError, "`kept_clips` must be at least 0, got -1"),
        ({"fps": 51}, ValueError, r"`fps` must be in \[1, 50\], got 51"),
        ({"scale": [1, "inf"]}, ValueError, "`scale` must be finite numbers"),
        ({"sampling_guidance_scale": "nan"}, ValueError, "must be a finite number, got nan"),
        ({"seed": -1}, ValueError, r"`seed` must be from 0 to 2\^32 - 1"),
        ({"output_dir": __file__}, ValueError, "`output_dir` must be a folder"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(evaluate, tmp_path, monkeypatch, arguments, error, message):
    (tmp_path / EMPTY).mkdir()
    (tmp_path / TARGET).write_text("prompt,group\na,target\n")
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    missing = {"nudenet", "imageio", "imageio_ffmpeg"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find_spec(name, *a))
    with pytest.raises(error, match=message):
        evaluate(**arguments)
    assert not (tmp_path / "out").exists()


def test_another_pipeline_is_refused(evaluate):
    with pytest.raises(ValueError, match="must be a .*CogVideoXPipeline, got a StableDiffusionPipeline"):
        evaluate(pretrained_model_name_or_path=MODEL_DIR)


@pytest.mark.parametrize("build", [tiny_image_to_video_pipeline, tiny_sd3_pipeline])
def test_pictures_and_clips_from_first_frames_are_evaluated_too(evaluate, tmp_path, build):
    base, erasers = save_base_and_erasers(tmp_path / "models", build(), names=("seven",))
    given = {"pretrained_model_name_or_path": base, "eraser": erasers, "attacks": ["scale"], "attack_scale": [0.5]}
    if build is tiny_image_to_video_pipeline:
        with pytest.raises(ValueError, match="`first_frames_dir` must be a folder of pictures for an image-to-video"):
            evaluate(**given)
        given["first_frames_dir"] = tmp_path / "first"
        (tmp_path / "first").mkdir()
        Image.new("RGB", (40, 20), "red").save(tmp_path / "first" / "red.png")
    else:
        given |= {"num_frames": None, "height": 32, "width": 32}
    report = evaluate(**given)
    assert set(report.groups) == {"target", "preserved", "words", "attack: scale 0.5", "all"}
    assert all(row["erased/drift"] > 0 for row in report.rows)
    assert report.settings.get("num_first_frames") == (1 if build is tiny_image_to_video_pipeline else None)


def test_several_processes_are_refused(evaluate, tmp_path, monkeypatch):
    several = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("diffusers_ext.training.run.setup.make_accelerator", lambda _: several)
    with pytest.raises(ValueError, match="must be one process, got 2"):
        evaluate()
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_training_serves_the_evaluation(tmp_path):
    path = tmp_path / "eraser.yaml"
    path.write_text(
        "target_concept: seven\nguidance_scale: 2.0\nprompts_file: t.txt\nheight: 64\n"
        "eraser: [a, b]\nsampling_batch_size: 3\n"
    )
    line = "--pretrained_model_name_or_path m --evaluation_prompts p --judge x:y --output_dir o"
    args = script.parse_args(["--config", str(path), *line.split()])
    assert (args.target_concept, args.height, args.eraser) == ("seven", 64, ["a", "b"])
    assert args.sampling_guidance_scale == 6.0  # the file's belongs to the loss
    assert (args.sampling_batch_size, args.scale) == (3, [1.0])

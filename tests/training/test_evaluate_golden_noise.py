from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffusers_ext.evaluation.golden_noise import RedenoisedTarget, evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from examples.digits.check_model import load_pipeline
from examples.digits.rewards import DigitsReward, SecondDigitsReward
from tests.evaluation.golden_subjects import small_network
from tests.training.script_runs import command_line, files_below
from training import evaluate_golden_noise as script

REWARD = "tests.training.stub_rewards:Brightness"
PROMPTS = ("a red nine", "# 1", "None")
RESULTS = {"report.json", "pictures.csv", "table.md", "sheet.png"}
DRAWING = {"num_inference_steps": 2, "guidance_scale": 1.5, "num_images_per_prompt": 2}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """Folder of a small network for the digits model."""
    folder = tmp_path_factory.mktemp("networks") / "small"
    small_network().save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, ""]))
    return path


@pytest.fixture
def evaluate(tmp_path, network, prompt_file, fresh_accelerator):
    """Run the script in this process; returns its report."""

    def run(name: str = "out", further: tuple = (), **arguments) -> GoldenNoiseReport:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        usual = {"output_dir": tmp_path / name, "prompt_file": prompt_file, "best_of": 1,
                 "noise_model": network, "reward": REWARD, **DRAWING}  # fmt: skip
        line: list[str] = []
        for key, value in {**usual, **arguments}.items():
            for one in value if isinstance(value, list) else [value]:
                line += [f"--{key}", str(one)]
        return script.main(script.parse_args([*command_line(), *line, *further]))

    return run


def test_the_report_is_that_of_the_library(evaluate, tmp_path):
    prompts = tmp_path / "digits.txt"
    prompts.write_text("a red nine\na blue four\n")
    rewards = ["examples.digits.rewards:DigitsReward", "examples.digits.rewards:SecondDigitsReward"]
    found = evaluate(prompt_file=prompts, reward=rewards, target_steps=[2, 1], seed=4, best_of=2, batch_size=3)
    assert list(found.noise) == ["standard", "2-step target", "1-step target", "small"]
    pipeline = load_pipeline()
    expected = evaluate_golden_noise(
        pipeline,
        ["a red nine", "a blue four"],
        refine={
            "2-step target": RedenoisedTarget(pipeline, 2),
            "1-step target": RedenoisedTarget(pipeline, 1),
            "small": small_network(),
        },
        rewards=[DigitsReward(), SecondDigitsReward()],
        seed=4,
        best_of=2,
        batch_size=3,
        show_progress=False,
        **DRAWING,
    )
    assert found.rows == expected.rows
    assert found.scores == expected.scores
    assert found.settings["rewards"] == expected.settings["rewards"]
    assert found.settings["subjects"]["small"]["parameters"] > 0


def test_files(evaluate, tmp_path, network, prompt_file):
    report = evaluate(sheet_prompts=2)
    folder = tmp_path / "out"
    assert files_below(folder) == RESULTS
    assert GoldenNoiseReport.from_json(folder / "report.json") == report
    assert (folder / "table.md").read_text() == report.to_table()
    assert len((folder / "pictures.csv").read_text().splitlines()) == 1 + 2 * len(PROMPTS)
    sheet = np.asarray(Image.open(folder / "sheet.png"), dtype=np.float32)
    assert sheet.shape[1] > 4 * 96
    assert sheet.std() > 50
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert settings["noise_model"] == [str(network)]
    assert settings["prompt_file"] == str(prompt_file)
    # Every line is a prompt.
    assert [row["prompt"] for row in report.rows] == [p for p in PROMPTS for _ in range(2)]


def test_max_prompts_takes_the_first_and_no_sheet_is_drawn_where_none_is_asked_for(evaluate, tmp_path):
    report = evaluate("few", max_prompts=2, sheet_prompts=0)
    assert [row["prompt"] for row in report.rows] == [p for p in PROMPTS[:2] for _ in range(2)]
    assert files_below(tmp_path / "few") == RESULTS - {"sheet.png"}


def test_networks_of_one_name_are_told_apart(evaluate, tmp_path, network):
    other = tmp_path / "small"
    small_network().save_pretrained(other)
    report = evaluate(noise_model=[network, other], golden_noise_scale=0.5)
    facts = report.settings["subjects"]
    assert list(facts) == ["small", "small (2)"]
    assert [fact["golden_noise_scale"] for fact in facts.values()] == [0.5, 0.5]
    assert report.scores["small"] == report.scores["small (2)"]


def test_arguments_from_a_file(evaluate, tmp_path, network, prompt_file):
    path = tmp_path / "golden.yaml"
    values = {"noise_model": [str(network)], "reward": REWARD, "prompt_file": str(prompt_file),
              "best_of": 1, "dataset_dir": "pairs", "margin": 0.1, "train_batch_size": 7,
              **DRAWING}  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    by_flags = evaluate()
    by_file = script.main(script.parse_args(command_line(config=path, output_dir=tmp_path / "f")))
    assert by_file.rows == by_flags.rows


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # of diffusers, on the Hub
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_model": []}, "`noise_model` or `target_steps` must be given"),
        ({"noise_model": "nowhere"}, "must be a folder or Hub name of a golden-noise network, got nowh"),
        ({"reward": []}, "`reward` must be given at least once"),
        ({"reward": "nothing"}, "`reward` must be one of"),
        ({"reward_version": "other=v2.1", "reward": [REWARD] * 2}, "must be REWARD=value"),
        ({"reward_model": "x"}, r"must be one of .* to take \['model'\]"),
        ({"reward": "tests.training.stub_rewards:BrokenForNine"}, "'broken' must be numbers, got nan"),
        ({"target_steps": 0}, r"`target_steps` must be at least 1 each, got \[0\]"),
        ({"prompt_file": "nowhere.txt"}, "got nowhere.txt: no such file"),
        ({"prompt_file": "/dev/null"}, "`prompt_file` must"),
        ({"best_of": 0}, "`best_of` must be at least 1, got 0"),
        ({"max_prompts": 0}, "`max_prompts` must be at least 1, got 0"),
        ({"w1": "inf"}, "`w1` must be a finite number, got inf"),
        ({"redenoise_steps": 1}, "`redenoise_steps` must be at least 2, got 1"),
        ({"dino": "a/b", "clip": "c/d"}, "`dino` must not be given together with `clip`"),
        ({"output_dir": __file__}, "`output_dir` must be a folder, got .*py"),
        ({"pretrained_model_name_or_path": "nowhere"}, "must be a folder or Hub name of a pipeline"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(evaluate, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        evaluate("out", **arguments)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(evaluate, tmp_path, monkeypatch):
    several = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("diffusers_ext.training.run.setup.make_accelerator", lambda _: several)
    with pytest.raises(ValueError, match="must be one process, got 2: what it times"):
        evaluate()
    assert not (tmp_path / "out").exists()


def test_all_pictures_are_written_where_asked_for(evaluate, tmp_path):
    line = ["--save_images"]
    report = evaluate(max_prompts=1, num_images_per_prompt=2, target_steps=1, seed=4, further=line)
    written = sorted(p.relative_to(tmp_path / "out/images") for p in tmp_path.glob("out/images/*/*"))
    seeds = [row["seed"] for row in report.rows]
    assert [str(path) for path in written] == [
        f"{side}/{row:05d}_seed_{seed}.png"
        for side in ("1-step_target", "small", "standard")
        for row, seed in enumerate(seeds)
    ]


def test_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--noise_model", "x"])
    said = capsys.readouterr().err
    assert "these arguments must be given: --" in said
    for name in ("pretrained_model_name_or_path", "prompt_file", "output_dir"):
        assert f"--{name}" in said


def test_what_may_be_repeated():
    line = "--base_model_id m --prompt_file p --output_dir o --reward r".split()
    line += "--noise_model a --noise_model b --target_steps 1 --target_steps 5".split()
    args = script.parse_args(line)
    assert args.pretrained_model_name_or_path == "m"
    assert (args.noise_model, args.target_steps, args.reward) == (["a", "b"], [1, 5], ["r"])
    assert (args.num_images_per_prompt, args.best_of, args.w1, args.w2) == (4, 4, 5.5, 1.0)

"""`diffusers-ext train` and `python -m diffusers_ext.training.<name>` are the mains of the scripts."""

from __future__ import annotations

import importlib
import subprocess

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from diffusers_ext.command_line.main import main
from diffusers_ext.command_line.options import FAILED
from diffusers_ext.command_line.train import TRAININGS
from training import generate_npd, train_cogvideox_eraser, train_noise_guard, train_npnet, train_nullspace_dreambooth

SCRIPTS = {
    "nullspace": train_nullspace_dreambooth,
    "pairs": generate_npd,
    "noise": train_npnet,
    "guard": train_noise_guard,
    "eraser": train_cogvideox_eraser,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_the_console_runs_the_main_of_the_script(name, monkeypatch, capsys):
    module = importlib.import_module(TRAININGS[name][1])
    assert module.main is SCRIPTS[name].main
    monkeypatch.setattr(module, "main", lambda settings: print(settings.output_dir))
    required = {
        "nullspace": ["--instance_data_dir", "p", "--instance_prompt", "a photo of sks"],
        "pairs": ["--prompt_file", "p"],
        "noise": ["--model", "rnn", "--dataset_dir", "d"],
        "guard": ["--noise_model", "n", "--dataset_dir", "d"],
        "eraser": ["--target_concept", "seven", "--prompts_file", "p"],
    }
    line = ["train", name, "--pretrained_model_name_or_path", "base", *required[name]]
    assert main([*line, "--output_dir", "out"]) == 0
    assert capsys.readouterr().out == "out\n"
    assert main(line) == 2
    assert "these arguments must be given: --output_dir" in capsys.readouterr().err
    assert main([*line, "--output_dir", "out", "--seed", "-1"]) == FAILED
    assert capsys.readouterr().err == "error: `--seed` must be from 0 to 2^32 - 1, got -1.\n"


def test_the_help_names_the_trainings(capsys):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TRAININGS)
    assert main(["train", "noise", "--model", "rnn", "--help"]) == 0
    assert "--gru_hidden_size" in capsys.readouterr().out
    for name in TRAININGS:
        assert main(["train", name, "--help"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: diffusers-ext train {name} [-h]")
        assert f"accelerate launch -m diffusers_ext.training.{name}" in said
    assert main(["train", "noise", "--config", "nowhere.yaml", "--help"]) == FAILED
    assert capsys.readouterr().err == "error: `config` must be a YAML file, got nowhere.yaml: no such file.\n"
    assert main(["train", "nothing"]) == 2


def test_accelerate_launches_the_module(capfd):
    alone = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    line = [*alone.split(), "-m", "diffusers_ext.training.eraser", "--seed", "-1"]
    with pytest.raises(subprocess.CalledProcessError):
        launch_command(launch_command_parser().parse_args(line))
    assert "error: these arguments must be given: " in capfd.readouterr().err
    for other in TRAININGS:
        assert importlib.util.find_spec(f"diffusers_ext.training.{other}") is not None

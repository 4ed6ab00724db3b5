from __future__ import annotations

import os
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from diffusers_ext.command_line.train import TRAININGS
from diffusers_ext.training import pairs as generate_npd
from diffusers_ext.training.eraser import run as train_cogvideox_eraser
from diffusers_ext.training.nullspace import run as train_nullspace_dreambooth
from diffusers_ext.training.run.setup import make_accelerator, settle_launcher_settings
from training import evaluate_eraser

ERASER = (
    "--pretrained_model_name_or_path m --target_concept dog --prompts_file p "
    "--preserved_concepts_file k --output_dir o"
)
EVALUATION = "--pretrained_model_name_or_path m --eraser e --evaluation_prompts p --judge nudenet --output_dir o"
PAIRS = "--prompt_file p --output_dir o"
SCRIPTS = ((train_cogvideox_eraser, ERASER), (evaluate_eraser, EVALUATION), (generate_npd, PAIRS))


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_launchers_precision_holds(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = train_cogvideox_eraser.parse_args(ERASER.split())
    assert make_accelerator(args).mixed_precision == "bf16"


@pytest.mark.parametrize(("script", "line"), SCRIPTS)
def test_all_scripts_take_accelerates_precision(script, line, monkeypatch):
    assert script.parse_args(line.split()).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert script.parse_args(line.split()).mixed_precision == "fp16"


@pytest.mark.parametrize(("script", "line"), SCRIPTS)
def test_a_contradiction_is_an_error_in_one_line(script, line, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SystemExit):
        script.parse_args([*line.split(), "--mixed_precision", "fp16"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "must be the same for accelerate and the script, got bf16" in said
    assert "(ACCELERATE_MIXED_PRECISION) and fp16" in said


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(None, None, "no"), (None, "no", "no"), (None, "fp16", "fp16"), ("bf16", None, "bf16"),
     ("bf16", "no", "bf16"), ("no", "no", "no"), ("fp16", "fp16", "fp16")],
)  # fmt: skip
def test_precisions_that_fit(ours, theirs, expected):
    args = Namespace(mixed_precision=ours)
    settle_launcher_settings(args, {} if theirs is None else {"ACCELERATE_MIXED_PRECISION": theirs})
    assert vars(args) == {"mixed_precision": expected}


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(None, None, 1), (None, "4", 4), (2, None, 2), (4, "4", 4)])
def test_accumulations_that_fit(ours, theirs, expected):
    args = Namespace(gradient_accumulation_steps=ours)
    variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    settle_launcher_settings(args, {} if theirs is None else {variable: theirs})
    assert vars(args) == {"gradient_accumulation_steps": expected}


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        ({"mixed_precision": "no"}, {"MIXED_PRECISION": "bf16"}, "got bf16 from accelerate"),
        ({"mixed_precision": None}, {"MIXED_PRECISION": "fp8"}, "must be one of no, fp16, bf16"),
        (
            {"gradient_accumulation_steps": 2},
            {"GRADIENT_ACCUMULATION_STEPS": "4"},
            "`gradient_accumulation_steps` must be the same .* got 4 .* and 2 from",
        ),
        ({"gradient_accumulation_steps": 2}, {"GRADIENT_ACCUMULATION_STEPS": "auto"}, "got 'auto'"),
        ({}, {"USE_FSDP": "true"}, "whole models, got FSDP. Launch"),
        ({}, {"USE_DEEPSPEED": "true"}, "whole models, got DeepSpeed. Launch"),
    ],
)
def test_what_contradicts_or_cannot_be_done(given, variables, message):
    variables = {f"ACCELERATE_{name}": value for name, value in variables.items()}
    with pytest.raises(ValueError, match=message):
        settle_launcher_settings(Namespace(**given), variables)


def test_a_compiled_training_saves_the_names_of_a_plain_one(teach, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = teach("compiled", max_train_steps=1, checkpointing_steps=1)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    plain = teach("plain", max_train_steps=1, checkpointing_steps=1)
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-1/trained_0.safetensors"):
        assert load_file(compiled / name).keys() == load_file(plain / name).keys()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_script_that_trains_nothing_says_that_it_compiles_nothing(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    make_accelerator(evaluate_eraser.parse_args(EVALUATION.split()))
    assert "INDUCTOR has no effect" in caplog.text


def test_checkpoints_know_the_precision(subject_line, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = train_nullspace_dreambooth.parse_args(subject_line())
    assert train_nullspace_dreambooth.run_facts(args)["mixed_precision"] == "bf16"


# As `accelerate config` writes them.
FSDP2 = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_state_dict_type: SHARDED_STATE_DICT}
num_processes: 2
use_cpu: true
"""
ZERO2 = """
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2, offload_optimizer_device: none, offload_param_device: none, zero3_init_flag: false}
num_processes: 2
"""
LINES = {
    "nullspace": "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p --output_dir o",
    "pairs": PAIRS,
    "noise": "--pretrained_model_name_or_path m --dataset_dir d --output_dir o",
    "guard": "--pretrained_model_name_or_path m --noise_model n --dataset_dir d --output_dir o",
    "eraser": ERASER,
}


def launched(config: str, folder: Path) -> dict[str, str]:
    """What accelerate puts into the environment of its processes for a config file."""
    (folder / "config.yaml").write_text(f"compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\n{config}")
    args = launch_command_parser().parse_args(["--config_file", str(folder / "config.yaml"), "script.py"])
    args, _, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # which is set where deepspeed is installed
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize(("config", "name"), [(FSDP2, "FSDP2"), (ZERO2, "DeepSpeed ZeRO-2")])
def test_every_training_refuses_shards_by_name(config, name, tmp_path, monkeypatch, capsys, subtests):
    changed = {key: value for key, value in launched(config, tmp_path).items() if os.environ.get(key) != value}
    for key, value in changed.items():
        monkeypatch.setenv(key, value)
    assert LINES.keys() == TRAININGS.keys()
    for training, line in LINES.items():
        with subtests.test(training=training):
            with pytest.raises(SystemExit):
                import_module(TRAININGS[training][1]).parse_args(line.split())
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"must run these scripts on whole models, got {name}. Launch them with `--multi_gpu` or on" in said

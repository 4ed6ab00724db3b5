"""Every flag and default that the scripts had stays; settings are checked where they are made."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest

from diffusers_ext.core.settings import ReportingSettings, named_values
from diffusers_ext.documented_names import DOCUMENTED_FLAGS, read_nullbooth_block
from diffusers_ext.training.eraser.run import parse_args
from diffusers_ext.training.run import checkpoint_files
from diffusers_ext.training.run.settings import parse_arguments, read_config, replaced_flag
from docs.settings_tables import script_parser

FLAGS = json.loads((Path(__file__).parents[1] / "fixtures" / "training_flags.json").read_text())
# Settings with a better name today, and the flag that still gives them.
RENAMED = {"guidance_scale": "negative_guidance", "rows_in_turn": "separate_passes"}


def minimal_line(script: str) -> list[str]:
    return [word for name in FLAGS[script]["required"] for word in (f"--{name}", f"given_{name}")]


@pytest.mark.parametrize("script", FLAGS)
def test_a_script_has_all_flags_and_defaults_that_it_had(script):
    known = {option for action in script_parser(script)._actions for option in action.option_strings}
    assert not set(FLAGS[script]["flags"]) - known
    found = importlib.import_module(f"training.{script}").parse_args(minimal_line(script))
    values = named_values(found)
    defaults = {name if name in values else RENAMED[name]: value for name, value in FLAGS[script]["defaults"].items()}
    assert {name: values[name] for name in defaults} == defaults
    assert {name: values[name] for name in FLAGS[script]["required"]} == {
        name: f"given_{name}" for name in FLAGS[script]["required"]
    }


def test_former_names_are_read_from_checkpoints_and_files(tmp_path, monkeypatch):
    old = {"guidance_scale": 0.5, "rows_in_turn": True, "weight_decay": 0.0}
    run = {"step": 3, "fingerprint": {"recipe": old}}
    monkeypatch.setattr(checkpoint_files, "_read_run", lambda folder: run)
    new = {"negative_guidance": 0.5, "separate_passes": True, "adam_weight_decay": 0.0}
    assert checkpoint_files.read_checkpoint(tmp_path) == (3, {"recipe": new})
    (tmp_path / "run.yaml").write_text("guidance_scale: 0.25\nrows_in_turn: true\n")
    line = [*minimal_line("train_cogvideox_eraser"), "--config", str(tmp_path / "run.yaml")]
    found = importlib.import_module("training.train_cogvideox_eraser").parse_args(line)
    assert (found.negative_guidance, found.separate_passes) == (0.25, True)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--name")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--kind", choices=["hard", "soft"], default="hard")
    parser.add_argument("--features", nargs="+", default=["k"])
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--enable", action=argparse.BooleanOptionalAction, default=True)
    return parser


@pytest.fixture
def write(tmp_path):
    def write_config(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write_config


FILE = """
name: -ab c
steps: 7
rate: 2e-2
kind: soft
features: [q, out]
prompt: [one, two]
fast: true
enable: false
"""


def test_the_file_gives_the_same_as_flags(parser, write):
    flags = ["--name=-ab c", "--steps", "7", "--rate", "2e-2", "--kind", "soft", "--features",
             "q", "out", "--prompt", "one", "--prompt", "two", "--fast", "--no-enable"]  # fmt: skip
    expected = vars(parse_arguments(parser, flags, ()))
    found = vars(parse_arguments(parser, ["--config", write(FILE)], ()))
    assert expected.pop("config") is None
    assert found.pop("config").endswith("config.yaml")
    assert found == expected
    assert found["rate"] == 0.02
    assert found["name"] == "-ab c"


def test_flags_override_the_file(parser, write):
    flags = ["--steps", "9", "--features", "v", "--prompt", "three", "--enable"]
    args = parse_arguments(parser, ["--config", write(FILE), *flags], ())
    assert (args.steps, args.features, args.prompt, args.enable) == (9, ["v"], ["three"], True)
    assert args.rate == 0.02


def test_empty_and_false_values_are_the_defaults(parser, write):
    args = parse_arguments(parser, ["--config", write("name:\nsteps: null\nfast: false")], ())
    assert (args.name, args.steps, args.fast) == (None, 5, False)


def test_single_values_serve_where_a_list_may_stand(parser, write):
    args = parse_arguments(parser, ["--config", write("features: q\nprompt: one")], ())
    assert (args.features, args.prompt) == (["q"], ["one"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1.5", "--steps: invalid int value: '1.5'"),
        ("steps: true", "--steps: invalid int value: 'True'"),
        ("name: no", '`name` must be a text, got the truth value false. .* quote it, as in name: "no"'),
        ("name: 007", "`name` must be a text, got int 7"),
        ("kind: off", "`kind` must be a text, got the truth value false"),
        ("features: [q, on]", "`features` must be a text, got the truth value true"),
        ("kind: hardest", "--kind: invalid choice: 'hardest'"),
        ("fast: 'no'", "`fast` must be true or false, got 'no'"),
        ("enable: 0", "`enable` must be true or false, got 0"),
        ("name: [a, b]", r"`name` must be one value, got \['a', 'b'\]"),
        ("name: {a: 1}", "`name` must not be a mapping"),
        ("features: []", "--features: expected at least one argument"),
        ("stepz: 5", r"config.yaml` must hold known arguments, got \['stepz'\]"),
    ],
)
def test_values_that_flags_would_refuse_are_refused(parser, write, capsys, text, message):
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--config", write(text)], ())
    assert re.search(message, capsys.readouterr().err)


def test_arguments_of_the_other_scripts_are_passed_over(parser, write, capsys):
    path = write("steps: 7\nlogging_steps: 3")
    args = parse_arguments(parser, ["--config", path], (), groups=[ReportingSettings])
    assert args.steps == 7
    assert not hasattr(args, "logging_steps")
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--config", path], ())
    assert "got ['logging_steps']" in capsys.readouterr().err


def test_required_arguments_may_come_from_either(parser, write, capsys):
    path = write("name: a")
    assert parse_arguments(parser, ["--config", path, "--rate", "1"], ("name", "rate")).rate == 1
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--config", path], ("name", "rate"))
    assert "these arguments must be given: --rate" in capsys.readouterr().err


def test_a_token_is_not_logged_by_wandb(capsys):
    parser = argparse.ArgumentParser()
    for name in ("--config", "--report_to", "--hub_token"):
        parser.add_argument(name)
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--report_to", "wandb", "--hub_token", "x"], ())
    assert "`--hub_token` must not be used with `--report_to wandb`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "`config` must be a YAML file, got .*no such file"),
        ("- a\n- b", "config.yaml must be a YAML mapping, got list"),
        ("", "config.yaml must be a YAML mapping, got NoneType"),
        ("a: [", "config.yaml must be a YAML file, got: while parsing"),
        ("1: a", "`config` must have names as keys, got 1 in .*config.yaml"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(str(path))


BLOCK = {
    "enable": True,
    "original_knowledge_prompts": "dogs.txt",
    "cov_matrices_output_dir": "cov",
    "visual_attention_map": True,
    "num_denoising_steps": 50,
    "nullspace_threshold": "2e-2",
    "collect_features": {"q_features": True, "k_features": False, "out_features": True},
    "cross_attention_layers": [0, 1],
}


def test_block_keys_become_arguments():
    values = {"nullbooth": BLOCK, "seed": 3}
    flat = read_nullbooth_block(values)
    assert flat == {
        "enable": True,
        "knowledge_prompts": "dogs.txt",
        "statistics": "cov",
        "visual_attention_map": True,
        "num_inference_steps": 50,
        "nullspace_threshold": "2e-2",
        "features": ["q", "out"],
        "cross_attention_layers": [0, 1],
        "seed": 3,
    }
    assert values["nullbooth"] is BLOCK


def test_statistics_go_to_their_own_folder():
    values = {"nullbooth": BLOCK, "output_dir": "trained"}
    assert read_nullbooth_block(values)["output_dir"] == "trained"
    assert read_nullbooth_block(values, "output_dir")["output_dir"] == "cov"
    written = read_nullbooth_block(values, "output_dir")
    assert "statistics" not in written
    tree = {"export_layout": True, "layout_timesteps": "all", "layout_dir": "."}
    assert written.items() >= tree.items()
    own = read_nullbooth_block({**values, "layout_timesteps": [20, 980]}, "output_dir")
    assert own["layout_timesteps"] == [20, 980]


def test_a_file_without_the_block_stays_as_it_is():
    assert read_nullbooth_block({"seed": 3}) == {"seed": 3}
    assert read_nullbooth_block({"seed": 3, "nullbooth": None}) == {"seed": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nullbooth": [1]}, r"`nullbooth` must be a mapping, got \[1\]"),
        ({"nullbooth": {"threshold": 1}}, r"`nullbooth` must have keys among .*got \['threshold'\]"),
        ({"nullbooth": BLOCK, "features": ["k"]}, r"must not repeat .*got \['features'\]"),
        ({"nullbooth": {"collect_features": {"k_features": False}}}, "one at least true"),
        ({"nullbooth": {"collect_features": {"k_features": "no"}}}, "to true or false"),
        ({"nullbooth": {"collect_features": ["k"]}}, "`collect_features` must map names"),
    ],
)
def test_unfit_blocks_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_nullbooth_block(values)


# Every flag that the design documents give to a script, by the script's name here.
DOCUMENTED = {
    "build_covariance": "config",
    "extract_prompts": "dataset_name split caption_column output_dir output_filename",
    "generate_npd": "prompt_file output_dir num_steps max_prompts output_size",
    "train_npnet": "dataset_dir output_dir npnet_model_id base_model_id num_epochs batch_size "
    "svd_dropout nt_adapter nt_finetune nt_dropout cross_attention",
    "train_noise_sequence": "dataset_dir output_dir base_model_id npnet_model_id text_embed_dim "
    "noise_resolution patch_size d_model nhead num_encoder_layers num_decoder_layers "
    "dim_feedforward max_seq_len predict_variance num_epochs batch_size learning_rate "
    "gradient_accumulation_steps cnn_base_filters cnn_num_blocks cnn_feat_dim gru_hidden_size "
    "gru_num_layers predict_residual kl_weight",
    "evaluate_golden_noise": "npnet_weights_path evaluation_prompts_file base_model_id output_dir "
    "npnet_model_id metrics svd_dropout nt_adapter cross_attention",
    "train_cogvideox_eraser": "model_path target_concept eraser_rank batch_size use_fp16 use_cpu_offload",
}


@pytest.mark.parametrize("script", DOCUMENTED)
def test_every_documented_flag_is_taken_or_says_what_to_use(script):
    parser = script_parser(script)
    known = {option for action in parser._actions for option in action.option_strings}
    for name in DOCUMENTED[script].split():
        said = replaced_flag(parser, [f"--{name}=1"])
        if f"--{name}" in known:
            assert said is None
        else:
            assert f"use {DOCUMENTED_FLAGS[f'--{name}']}" in said
            used = said.partition("; use ")[2].split()[0].rstrip(".,")
            assert used in known or used == "nothing:"


def test_a_script_ends_with_what_to_use(capsys):
    line = ["--model_path", "a", "--target_concept", "b", "--prompts_file", "c"]
    with pytest.raises(SystemExit):
        parse_args(line)
    assert "`--model_path` of the design documents is not known here" in capsys.readouterr().err

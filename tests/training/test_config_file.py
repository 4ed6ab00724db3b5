from __future__ import annotations

import argparse
import re

import pytest

from diffusers_ext.core.settings import ReportingSettings
from diffusers_ext.training.run.config_file import parse_arguments, read_config, read_nullbooth_block


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

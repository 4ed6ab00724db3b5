from __future__ import annotations

import pytest

from training import train_noise_sequence, train_npnet

LINE = ["--base_model_id", "b", "--dataset_dir", "d", "--output_dir", "o"]


def test_names_of_the_design_document():
    args = train_npnet.parse_args([*LINE, "--batch_size", "5", "--num_train_epochs", "3"])
    assert (args.pretrained_model_name_or_path, args.train_batch_size) == ("b", 5)
    assert (args.num_epochs, args.max_train_steps) == (3, None)


@pytest.mark.parametrize(
    ("script", "model", "batch", "rate"),
    [
        (train_npnet, "npnet", 16, 1e-4),
        (train_npnet, "golden_noise_model", 32, 5e-4),
        (train_noise_sequence, "transformer", 8, 5e-5),
        (train_noise_sequence, "rnn", 16, 1e-4),
    ],
)
def test_defaults_follow_the_network(script, model, batch, rate):
    args = script.parse_args([*LINE, "--model", model])
    assert (args.train_batch_size, args.learning_rate) == (batch, rate)
    assert args.adam_weight_decay == 1e-2
    given = script.parse_args([*LINE, "--model", model, "--adam_weight_decay", "0", "--learning_rate", "1"])
    assert (given.adam_weight_decay, given.learning_rate) == (0, 1)


def test_one_yaml_file_serves_generation_training_and_evaluation(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "base_model_id: base\ndataset_dir: d\noutput_dir: o\nuse_ema: true\nswin_depths: [1, 2]\n"
        "prompt_file: p\nnum_steps: 5\nbatch_size: 64\nw1: 5.5\nnum_inference_steps: 6\nd_model: 8\n"
    )
    args = train_npnet.parse_args(["--config", str(config), "--train_batch_size", "3"])
    assert (args.pretrained_model_name_or_path, args.train_batch_size) == ("base", 3)
    assert (args.use_ema, args.swin_depths) == (True, [1, 2])
    assert train_noise_sequence.parse_args(["--config", str(config)]).d_model == 8


def test_an_unknown_name_and_two_base_models_are_errors(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("base_model: base\n")
    with pytest.raises(SystemExit):
        train_npnet.parse_args([*LINE, "--config", str(config)])
    assert "must hold known arguments, got ['base_model']" in capsys.readouterr().err
    config.write_text("base_model_id: a\npretrained_model_name_or_path: b\n")
    with pytest.raises(ValueError, match="must not stand beside its other name `base_model_id`"):
        train_npnet.parse_args([*LINE, "--config", str(config)])


def test_data_and_output_must_be_given(capsys):
    with pytest.raises(SystemExit):
        train_npnet.parse_args([])
    error = capsys.readouterr().err
    for flag in ("--pretrained_model_name_or_path", "--output_dir"):
        assert flag in error.partition("these arguments must be given: ")[2]
    with pytest.raises(ValueError, match="`dataset_dir` must be given with `--objective pairs`"):
        train_npnet.parse_args(["--base_model_id", "b", "--output_dir", "o"])

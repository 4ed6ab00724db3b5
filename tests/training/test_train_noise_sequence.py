from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from tests.tiny_pipelines import sdxl_pipeline
from tests.training.noise_runs import noise_line, read_report, train
from tests.training.noise_sets import SHAPE, digits_facts, write_noises
from training import train_noise_sequence

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noises") / "sequences"
    return write_noises(folder, 3, facts=digits_facts())


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_the_loss_falls_below_the_identity_by_teacher_forcing_and_by_roll_out(model, sequences, tmp_path):
    report = read_report(train(model, sequences, tmp_path / "out", max_train_steps=50))
    first, last = report["history"][0], report["history"][-1]
    for step in ("first", "last"):
        assert last[f"relative_{step}"] < 0.6 * first[f"relative_{step}"]
        figures = report["validation"][-1]
        assert figures[f"train_relative_{step}"] < 0.5
        assert figures[f"train_relative_rollout_{step}"] < 0.5
        assert figures[f"train_cosine_rollout_{step}"] > 0.8
        assert figures[f"validation_relative_rollout_{step}"] < 0.8
    network = load_noise_model(tmp_path / "out")
    assert network.config.num_steps == 3
    refined = network.refine(source_noise(0, SHAPE)[None], torch.randn(1, 16, 128))
    assert noise_statistics(refined).std.item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("model", "structure"),
    [
        ("transformer", {"patch_size": 4, "d_model": 16, "nhead": 4, "num_encoder_layers": 2}),
        ("transformer", {"num_decoder_layers": 1, "dim_feedforward": 24, "dropout": 0.1}),
        ("transformer", {"predict_variance": True}),
        ("rnn", {"cnn_base_filters": 16, "cnn_num_blocks": [2, 1], "cnn_feat_dim": 32}),
        ("rnn", {"gru_hidden_size": 8, "gru_num_layers": 2, "predict_variance": True}),
        ("rnn", {"num_attention_heads": 4, "num_attention_layers": 2, "num_text_layers": 0}),
    ],
)
def test_each_flag_reaches_the_config(model, structure, sequences, tmp_path):
    folder = train(model, sequences, tmp_path / "out", max_train_steps=1, **structure)
    config = load_noise_model(folder).config
    assert {name: config[name] for name in structure} == structure
    assert (config.in_channels, config.num_steps, config.text_embed_dim) == (4, 3, 128)


def test_whole_states_can_be_predicted_in_place_of_changes(sequences, tmp_path):
    line = noise_line("transformer", sequences, tmp_path / "out", max_train_steps=1)
    folder = train_noise_sequence.main(train_noise_sequence.parse_args([*line, "--no-predict_residual"]))
    assert load_noise_model(folder).config.predict_residual is False


def test_longer_data_is_cut(sequences, tmp_path):
    folder = train("transformer", sequences, tmp_path / "out", max_seq_len=3)
    assert load_noise_model(folder).config.num_steps == 2
    assert read_report(folder)["data"]["steps"] == [1, 2]


def test_the_output_statistics_are_priced(sequences, tmp_path):
    usual, free, dear = (
        read_report(train("rnn", sequences, tmp_path / f"{weight}", kl_weight=weight)) for weight in (None, 0, 1.0)
    )
    assert usual["arguments"]["kl_weight"] == 0.01
    assert "kl" not in free["history"][-1]
    last = dear["history"][-1]
    assert last["loss"] > last["kl"] > 0


def test_a_pooled_text_embedding_alone(tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    noises = write_noises(tmp_path / "sequences", 2)
    run = {"pretrained_model_name_or_path": tmp_path / "sdxl", "pooled_text": True}
    folder = train("rnn", noises, tmp_path / "out", text_embed_dim=16, **run)
    config = load_noise_model(folder).config
    assert (config.pooled_text, config.text_embed_dim) == (True, 16)
    with pytest.raises(ValueError, match="`text_embed_dim` must be the base model's 80, 16 pooled"):
        train("rnn", noises, tmp_path / "other", text_embed_dim=80, **run)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("transformer", {"max_seq_len": 5}, "`max_seq_len` must be from 3 to 4, .* got 5"),
        ("transformer", {"max_seq_len": 2}, "`max_seq_len` must be from 3 to 4, .* got 2"),
        ("transformer", {"gru_num_layers": 1}, "`gru_num_layers` must not .* `--model rnn`"),
        ("transformer", {"kl_weight": 0.1}, "`kl_weight` must not be given with .* transformer"),
        ("rnn", {"kl_weight": -1.0}, "`kl_weight` must be at least 0, got -1.0"),
        ("rnn", {"d_model": 8}, "`d_model` must not be given with `--model rnn`"),
        ("rnn", {"pooled_text": True}, "must not be given for a base model without pooled"),
        ("rnn", {"text_embed_dim": 1280}, "`text_embed_dim` must be the base model's 128, got"),
        ("rnn", {"validation_split": 0.9}, "`validation_split` must leave prompts .* 4 different"),
    ],
)
def test_bad_input(model, arguments, message, sequences, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(model, sequences, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_pairs_of_one_step_are_refused(tmp_path):
    pairs = write_noises(tmp_path / "pairs")
    with pytest.raises(ValueError, match="must hold sequences of at least 2 steps, got pairs"):
        train("transformer", pairs, tmp_path / "out")


def test_a_network_of_more_steps_goes_on_with_fewer(sequences, tmp_path):
    first = train("transformer", sequences, tmp_path / "first")
    shape = dict.fromkeys(
        ("patch_size", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers",
         "dim_feedforward")
    )  # fmt: skip
    again = train("transformer", sequences, tmp_path / "two", init_from=first, max_seq_len=3, **shape)
    assert load_noise_model(again).config.num_steps == 3
    short = train("transformer", sequences, tmp_path / "short", max_seq_len=3)
    with pytest.raises(ValueError, match="must be a network with `num_steps` = 3, got 2"):
        train("transformer", sequences, tmp_path / "out", init_from=short, **shape)

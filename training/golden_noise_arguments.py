"""Argument groups of the scripts that train golden-noise networks."""

from __future__ import annotations

import argparse
from argparse import BooleanOptionalAction
from typing import Any

from training.arguments import (
    add_hub_arguments,
    add_model_arguments,
    add_resume_argument,
    add_training_arguments,
)


def add_noise_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pairs or sequences, and the text that belongs to them."""
    group = parser.add_argument_group("noise data")
    group.add_argument(
        "--base_model_id",
        dest="pretrained_model_name_or_path",
        help="the same as --pretrained_model_name_or_path",
    )
    group.add_argument("--dataset_dir", help="noise pairs or sequences: folder or Hub name")
    group.add_argument("--dataset_revision", help="revision of the noises on the Hub")
    group.add_argument(
        "--npnet_model_id",
        choices=["SDXL", "DreamShaper", "DiT"],
        help="checks that the base model's text has this model's width",
    )
    group.add_argument("--text_embed_dim", type=int, help="checked; read from the base model")
    group.add_argument("--noise_resolution", type=int, help="checked; read from the data")
    group.add_argument(
        "--remove_prompt_mean",
        type=float,
        default=0.0,
        help="share of a prompt's mean change taken out of the targets; keeps pictures diverse",
    )
    group.add_argument("--validation_split", type=float, default=0.05, help="share of the prompts")
    group.add_argument("--text_batch_size", type=int, default=32, help="prompts encoded at once")
    group.add_argument(
        "--text_cache_dtype", choices=["fp16", "fp32"], default="fp16", help="of kept embeddings"
    )
    group.add_argument("--text_cache_dir", help="keep embeddings in files there, not in memory")


def add_noise_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What the training of these networks has besides the ordinary group."""
    group = parser.add_argument_group("noise training")
    group.add_argument(
        "--num_epochs", "--num_train_epochs", type=int, help="--max_train_steps goes before it"
    )
    group.add_argument(
        "--batch_size", dest="train_batch_size", type=int, help="the same as --train_batch_size"
    )
    group.add_argument("--use_ema", action="store_true", help="save averaged weights")
    group.add_argument("--ema_decay", type=float, default=0.999, help="of the averaged weights")
    group.add_argument("--init_from", help="saved network to go on from; NPNet's also as .pth")


def add_noise_reporting_arguments(parser: argparse.ArgumentParser) -> None:
    """Logs and figures on held-out prompts."""
    group = parser.add_argument_group("reporting")
    group.add_argument("--report_to", help="tensorboard, wandb, ...; nothing without it")
    group.add_argument("--logging_dir", default="logs", help="below the output folder")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between two log lines")
    group.add_argument("--validation_steps", type=int, help="only at the end without it")
    group.add_argument("--num_validation_pairs", type=int, default=256, help="at most")


def add_npnet_arguments(parser: argparse.ArgumentParser) -> None:
    """Structure of NPNet; what is not given is the network's own default."""
    group = parser.add_argument_group("NPNet")
    for name, meaning in (
        ("svd_dropout", "norms and dropout in the SVD branch"),
        ("nt_adapter", "convolutions before Swin"),
        ("nt_finetune", "train the last two stages of Swin"),
        ("nt_dropout", "dropout on the output of Swin"),
        ("cross_attention", "attend from Swin's output to the text"),
    ):
        group.add_argument(f"--{name}", action=BooleanOptionalAction, help=meaning)
    group.add_argument("--svd_signs", choices=["canonical", "backend"], help="of singular vectors")
    for name, meaning in (
        ("svd_hidden_dim", "width of the SVD branch's tokens"),
        ("svd_output_dim", "width of the network of the pooled tokens"),
        ("svd_num_heads", "attention heads in it"),
        ("swin_image_size", "side to which noise is brought for Swin"),
        ("swin_patch_size", "side of Swin's patches"),
        ("swin_embed_dim", "width of its first stage"),
        ("swin_window_size", "patches a side of an attention window"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)
    for name in ("swin_depths", "swin_num_heads"):
        group.add_argument(f"--{name}", type=int, nargs="+", help="one number per stage")


def add_golden_noise_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Structure of GoldenNoiseModel; what is not given is the network's own default."""
    group = parser.add_argument_group("GoldenNoiseModel")
    for name, meaning in (
        ("patch_size", "side of a patch of noise"),
        ("width", "of its tokens"),
        ("num_layers", "of the transformer"),
        ("num_heads", "of its attention"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)


def add_target_argument(parser: argparse.ArgumentParser) -> None:
    """Which step of a sequence is a pair's golden noise."""
    parser.add_argument(
        "--target_step", default="last", help="step of sequence data that is the target, from 1"
    )


def add_noise_sequence_arguments(parser: argparse.ArgumentParser) -> None:
    """What both sequence networks have."""
    group = parser.add_argument_group("sequence networks")
    group.add_argument("--max_seq_len", type=int, help="states with the first; cuts longer data")
    group.add_argument(
        "--predict_variance", action=BooleanOptionalAction, help="also predict how sure a number is"
    )
    group.add_argument(
        "--predict_residual", action=BooleanOptionalAction, help="predict the change, not the state"
    )
    group.add_argument("--dropout", type=float, help="in the network")


def add_sequence_transformer_arguments(parser: argparse.ArgumentParser) -> None:
    """Structure of NoiseSequenceTransformer; what is not given is the network's own default."""
    group = parser.add_argument_group("NoiseSequenceTransformer")
    for name, meaning in (
        ("patch_size", "side of a patch of noise"),
        ("d_model", "width of its tokens"),
        ("nhead", "attention heads"),
        ("num_encoder_layers", "that read the text"),
        ("num_decoder_layers", "that read the noises"),
        ("dim_feedforward", "inner width of the feed-forward layers"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)


def add_sequence_rnn_arguments(parser: argparse.ArgumentParser) -> None:
    """Structure of NoiseSequenceRNN and its second loss."""
    group = parser.add_argument_group("NoiseSequenceRNN")
    group.add_argument("--cnn_base_filters", type=int, help="channels of the first stage")
    group.add_argument("--cnn_num_blocks", type=int, nargs="+", help="one number per stage")
    group.add_argument("--cnn_feat_dim", type=int, help="width of a state's features")
    for name, meaning in (
        ("gru_hidden_size", "width of the recurrent state"),
        ("gru_num_layers", "recurrent layers"),
        ("num_attention_heads", "of the attention to the text"),
        ("num_attention_layers", "before the recurrent ones"),
        ("num_text_layers", "that read the text"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)
    group.add_argument(
        "--pooled_text", action=BooleanOptionalAction, help="read the pooled text embedding alone"
    )
    group.add_argument(
        "--kl_weight", type=float, help="of the output's statistics; 0.01 by default"
    )


def read_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a YAML file with `base_model_id` under its main name.

    `batch_size` is no alias there: in a file for all scripts it is that of generation and evaluation.

    Raises:
        ValueError: both names of the base model are given.
    """
    values, alias, name = dict(values), "base_model_id", "pretrained_model_name_or_path"
    if alias not in values:
        return values
    if name in values:
        raise ValueError(f"`{name}` must not stand beside its other name `{alias}`.")
    values[name] = values.pop(alias)
    return values


PAIR_GROUPS = (
    add_model_arguments,
    add_training_arguments,
    add_resume_argument,
    add_hub_arguments,
    add_noise_data_arguments,
    add_noise_training_arguments,
    add_noise_reporting_arguments,
    add_npnet_arguments,
    add_golden_noise_model_arguments,
    add_target_argument,
)
SEQUENCE_GROUPS = (
    *PAIR_GROUPS[:7],
    add_noise_sequence_arguments,
    add_sequence_transformer_arguments,
    add_sequence_rnn_arguments,
)

from __future__ import annotations

import argparse

import pytest

from training.argument_rules import check_training_arguments, check_values
from training.train_nullspace_dreambooth import parse_args


@pytest.fixture
def args(subject_line) -> argparse.Namespace:
    return parse_args(subject_line())


def test_the_usual_arguments_are_right(args):
    check_training_arguments(args)
    for name in ("linear", "cosine", "constant_with_warmup", "polynomial"):
        args.lr_scheduler = name
        check_training_arguments(args)
    args.report_to, args.max_grad_norm = "tensorboard", float("inf")
    check_training_arguments(args)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_train_steps", 0, "at least 1, got 0"),
        ("train_batch_size", 0, "at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "at least 1, got 0"),
        ("logging_steps", -1, "at least 1, got -1"),
        ("checkpointing_steps", 0, "at least 1, got 0"),
        ("checkpoints_total_limit", 0, "at least 1, got 0"),
        ("num_validation_images", 0, "at least 1, got 0"),
        ("validation_steps", 0, "at least 1, got 0"),
        ("num_inference_steps", 0, "at least 1, got 0"),
        ("lr_warmup_steps", -1, "at least 0, got -1"),
        ("dataloader_num_workers", -1, "at least 0, got -1"),
        ("adam_weight_decay", -0.1, "at least 0, got -0.1"),
        ("adam_epsilon", float("nan"), "at least 0, got nan"),
        ("learning_rate", 0.0, "positive, got 0.0"),
        ("learning_rate", -1.0, "positive, got -1.0"),
        ("learning_rate", float("nan"), "positive, got nan"),
        ("learning_rate", float("inf"), "positive, got inf"),
        ("max_grad_norm", 0.0, "positive, got 0.0"),
        ("adam_beta1", 1.0, r"in \[0, 1\), got 1.0"),
        ("adam_beta2", -0.1, r"in \[0, 1\), got -0.1"),
        ("seed", -1, "from 0 to 2.32 - 1, got -1"),
        ("seed", 2**32, "from 0 to 2.32 - 1, got 4294967296"),
        ("lr_scheduler", "piecewise_constant", "one of .*'cosine'.*, got piecewise_constant"),
        (
            "report_to",
            "no_such_tracker",
            "an installed tracker, .*tensorboard.*got no_such_tracker",
        ),
        ("output_dir", __file__, "a folder, got .*test_argument_rules.py"),
    ],
)
def test_wrong_values_are_named(args, name, value, rule):
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must be {rule}"):
        check_training_arguments(args)


def test_what_is_not_given_breaks_no_rule():
    args = argparse.Namespace(first=None, second=2)
    check_values(args, ["first", "second"], "even", lambda value: value % 2 == 0)
    with pytest.raises(ValueError, match="`second` must be odd, got 2."):
        check_values(args, ["first", "second"], "odd", lambda value: value % 2)

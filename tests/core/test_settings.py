from __future__ import annotations

from dataclasses import dataclass

import pytest

from diffusers_ext.core.settings import (
    ImageReportingSettings,
    ModelSettings,
    SamplingSettings,
    TrainingSettings,
    check_keywords,
    did_you_mean,
)


@dataclass(kw_only=True)
class RunSettings(ModelSettings, TrainingSettings, ImageReportingSettings, SamplingSettings):
    """All shared settings with rules."""


GIVEN = {"pretrained_model_name_or_path": "base", "output_dir": "out"}


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "constant_with_warmup"},
        {"report_to": "tensorboard", "max_grad_norm": float("inf")},
        {"report_to": "all", "learning_rate": None},
    ],
)
def test_usual_values_are_right(values):
    settings = RunSettings(**GIVEN, **values)
    assert all(getattr(settings, name) == value for name, value in values.items())


def test_wrong_values_are_named():
    for name, value, rule in (
        *((count, 0, "at least 1, got 0") for count in (
            "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
            "checkpointing_steps", "checkpoints_total_limit", "num_validation_images",
            "validation_steps", "num_inference_steps",
        )),
        ("logging_steps", -1, "at least 1, got -1"),
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
        ("mixed_precision", "half", "one of .*'fp16'.*, got 'half'"),
        ("lr_scheduler", "piecewise_constant", "one of .*'cosine'.*, got piecewise_constant"),
        ("report_to", "no_such_tracker", "an installed tracker, .*tensorboard.*got no_such_tracker"),
        ("output_dir", __file__, "a folder, got .*test_settings.py"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}"):
            RunSettings(**{**GIVEN, name: value})


def test_the_nearest_names():
    assert did_you_mean("rnak", ["rank", "seed"]) == " Did you mean 'rank'?"
    assert did_you_mean(["rnak", "SEEDS"], ["rank", "seed"]) == " Did you mean 'rank' and 'seed'?"
    assert did_you_mean("colour", ["rank", "seed"]) == ""


def test_keywords_that_nothing_takes():
    check_keywords({"rank": 4}, ["rank", "seed"], "train")
    with pytest.raises(TypeError) as refused:
        check_keywords({"rnak": 4}, iter(["rank", "seed"]), "train", "it takes rank")
    assert str(refused.value) == (
        "train() got an unexpected keyword argument 'rnak': it takes rank. Did you mean 'rank'?"
    )
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'colour'\.$"):
        check_keywords({"colour": 4}, ["rank"], "train")

from __future__ import annotations

import importlib
import re
import shlex
from argparse import Namespace

import pytest

import diffusers_ext
from diffusers_ext.training.nullspace.statistics import statistics_words
from diffusers_ext.training.nullspace.subject import directions_words, subject_words
from diffusers_ext.training.run.script import eraser_words, network_words, pairs_words

ARGS = Namespace(
    pretrained_model_name_or_path="my models/base",
    output_dir="out put",
    instance_prompt="a photo of sks dog",
    knowledge_prompts=None,
    full_finetune=False,
    max_train_steps=600,
    target_concept="dog",
)
RUN = {"seconds": 300.0, "history": [{"step": 10, "loss": 0.5}, {"step": 600, "loss": 0.25}]}
SUBJECT = {**RUN, "predicted_drift": {"a.to_k": 4e-6, "b.to_v": 1e-4}}
NETWORK = {
    **RUN,
    "network": "GoldenNoiseModel",
    "data": {"training_samples": 40},
    "validation": [{"validation_relative": 0.4, "validation_cosine": 0.8, "train_relative": 0.3}],
}
ERASER = {**RUN, "prompts": {"target": ["a dog"], "preserved": ["a cat", "a fox"]}}


@pytest.mark.parametrize(
    "words",
    [
        subject_words(ARGS, SUBJECT, 5),
        network_words(ARGS, NETWORK),
        eraser_words(ARGS, ERASER),
        statistics_words(ARGS, 3, 60.0),
        pairs_words(ARGS),
    ],
)
def test_the_commands_and_calls_are_those_that_exist(words):
    assert "\n" not in words
    assert "{" not in words  # no raw dictionary
    script, flags = re.search(r"python training/(\w+)\.py (.*)$", words).groups()
    args = importlib.import_module(f"training.{script}").parse_args(shlex.split(flags))
    assert args.pretrained_model_name_or_path == "my models/base"
    for name in re.findall(r"diffusers_ext\.(\w+)", words):
        assert hasattr(diffusers_ext, name)


def test_what_was_learnt_and_kept():
    words = subject_words(ARGS, SUBJECT, 5)
    assert "Learnt 'a photo of sks dog' from 5 pictures in 600 steps (5 min, loss 0.5 to 0.25)." in words
    assert "move by at most 1.00% (b.to_v), as predicted" in words
    assert "pipe.load_lora_weights('out put')" in words
    plain = subject_words(ARGS, {**RUN, "history": []}, 1)
    assert "from 1 picture in 600 steps (5 min). Nothing was constrained" in plain
    full = subject_words(Namespace(**{**vars(ARGS), "full_finetune": True}), RUN, 1)
    assert "DiffusionPipeline.from_pretrained('out put/pipeline')" in full
    assert "relative 0.4, cosine 0.8 (relative" in network_words(ARGS, NETWORK)
    unmeasured = network_words(ARGS, {**NETWORK, "validation": []})
    assert "Nothing was held out to measure it on." in unmeasured
    assert "on 1 prompt that ask for it and to keep 2 others" in eraser_words(ARGS, ERASER)


def test_directions_in_words():
    row = {"matrix": "text", "linears": 14, "rank": 1, "smallest_ratio": 52.0, "instance_share": 0.25}
    words = directions_words([row])
    assert "text: 1 for 14 layers, with 25.0% of what is new" in words
    assert "at least 52 times" in words

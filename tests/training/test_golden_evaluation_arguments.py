from __future__ import annotations

from argparse import Namespace

import pytest

from training.golden_evaluation_arguments import by_reward, parse_golden_evaluation_arguments


def test_values_belong_to_their_reward():
    args = Namespace(reward=["hpsv2", "a:b"], reward_version=["hpsv2=v2.1"])
    assert by_reward(args, "reward_version") == {"hpsv2": "v2.1"}
    args = Namespace(reward=["hpsv2"], reward_model=["/weights/rank=8"])
    assert by_reward(args, "reward_model") == {"hpsv2": "/weights/rank=8"}


@pytest.mark.parametrize("given", [["hpsv2"], ["hpsv2="], ["other=x"], ["hpsv2=a", "hpsv2=b"]])
def test_other_forms_are_refused(given):
    args = Namespace(reward=["hpsv2", "a:b"], reward_model=given)
    with pytest.raises(ValueError, match=r"`reward_model` must be REWARD=value, once for each of"):
        by_reward(args, "reward_model")


def test_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        parse_golden_evaluation_arguments("evaluate", ["--noise_model", "x"])
    missing = "--pretrained_model_name_or_path, --prompt_file, --output_dir"
    assert f"these arguments must be given: {missing}" in capsys.readouterr().err


def test_what_may_be_repeated():
    line = "--pretrained_model_name_or_path m --prompt_file p --output_dir o".split()
    line += "--noise_model a --noise_model b --target_steps 1 --target_steps 5 --reward r".split()
    args = parse_golden_evaluation_arguments("evaluate", line)
    assert (args.noise_model, args.target_steps, args.reward) == (["a", "b"], [1, 5], ["r"])
    assert (args.num_images_per_prompt, args.best_of, args.w1, args.w2) == (4, 4, 5.5, 1.0)

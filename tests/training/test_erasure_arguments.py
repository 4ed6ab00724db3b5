from __future__ import annotations

import pytest

from training.erasure_arguments import (
    check_erasure_arguments,
    parse_erasure_arguments,
    read_erasure_prompts,
)


LINE = ["--pretrained_model_name_or_path", "m", "--evaluation_prompts", "p.csv", "--judge", "clip",
        "--output_dir", "out"]  # fmt: skip
ENOUGH = ["--eraser", "e", "--classes", "a", "b", "--target_concept", "a"]


def test_prompts_by_group_with_their_seeds(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        'seed,prompt,group,note\n7,"a seven, red",target,x\n,a one,preserved,\n 0 ,seven,target,\n'
        "\n3,7,my paraphrase,\n",
        encoding="utf-8",
    )
    found = read_erasure_prompts(path)
    assert found.groups == {
        "target": ["a seven, red", "seven"],
        "preserved": ["a one"],
        "my paraphrase": ["7"],
    }
    assert found.seeds == {"target": [7, 0], "preserved": [None], "my paraphrase": [3]}
    path.write_text('"prompt","group"\na,target\nb,preserved\n')
    assert read_erasure_prompts(path).seeds == {"target": [None], "preserved": [None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a table of prompts .*, got .*: no such file"),
        ("", "must have the columns .'prompt', 'group'."),
        ("prompt\na\n", "must have the column 'group'"),
        ("prompt,group\n", r"got none of \['target', 'preserved'\]"),
        ("prompt,group\na,target\n", r"got none of \['preserved'\]"),
        ("prompt,group\na,target\n,preserved\n", "Row 2 of .* must have a prompt, .* got ''"),
        ("prompt,group\na,\n", "Row 1 of .* must have a prompt, a group"),
        ("prompt,group,seed\na,target,-1\n", "Row 1 .* at most a seed from 0, got .* '-1'"),
        ("prompt,group,seed\na,target,1.5\n", "Row 1 .* '1.5'"),
        ("prompt,group\na,b,target\n", "must have 2 fields like the header, got 3"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "p.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_erasure_prompts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ENOUGH[2:], "`eraser` must be given at least once"),
        (ENOUGH[:2], "`classes` and `target_concept` must be given for `--judge clip`"),
        ([*ENOUGH, "--num_videos_per_prompt", "0"], "`num_videos_per_prompt` must be at least 1"),
        ([*ENOUGH, "--num_frames", "0"], "`num_frames` must be at least 1, got 0"),
        ([*ENOUGH, "--kept_clips", "-1"], "`kept_clips` must be at least 0, got -1"),
        ([*ENOUGH, "--fps", "51"], r"`fps` must be in \[1, 50\], got 51"),
        ([*ENOUGH, "--scale", "1", "inf"], "`scale` must be finite numbers"),
        ([*ENOUGH, "--sampling_guidance_scale", "nan"], "must be a finite number, got nan"),
        ([*ENOUGH, "--seed", "-1"], r"`seed` must be from 0 to 2\^32 - 1"),
        ([*ENOUGH, "--output_dir", __file__], "`output_dir` must be a folder"),
    ],
)
def test_wrong_values_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        check_erasure_arguments(parse_erasure_arguments("", [*LINE, *line]))


def test_a_file_of_the_training_serves_the_evaluation(tmp_path):
    path = tmp_path / "eraser.yaml"
    path.write_text(
        "target_concept: seven\nguidance_scale: 2.0\nprompts_file: t.txt\nheight: 64\neraser: [a, b]\n"
    )
    args = parse_erasure_arguments("", ["--config", str(path), *LINE])
    assert (args.target_concept, args.height, args.eraser) == ("seven", 64, ["a", "b"])
    assert args.sampling_guidance_scale == 6.0  # the file's `guidance_scale` is the loss's
    assert args.scale == [1.0]

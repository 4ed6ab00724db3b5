"""Clips of moving digits, and the judge that reads them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from examples.digits.pictures import real_digits
from examples.digits.prompts import COLORS, DIGITS
from examples.moving_digits.clips import (
    CANVAS,
    GRID,
    NUM_FRAMES,
    MovingDigits,
    follow,
    make_clip,
    positions,
    to_clips,
    to_pixels,
)
from examples.moving_digits.judge import NOTHING, MovingDigitsJudge
from examples.moving_digits.prompts import COMBINATIONS, DIRECTIONS, TEMPLATES


@pytest.fixture(scope="module")
def digits():
    return MovingDigits()


@pytest.fixture(scope="module")
def judge():
    return MovingDigitsJudge()


@pytest.fixture(scope="module")
def real(digits):
    """200 real clips and their prompts, all colours and directions among them."""
    entries = digits.entries[:: len(digits) // 200][:200]
    asked = [
        TEMPLATES[i % len(TEMPLATES)].format(color=color, digit=digit, direction=direction)
        for i, (color, digit, direction) in enumerate(COMBINATIONS[c] for _, c in entries)
    ]
    return np.stack([digits.clip(entry) for entry in entries]), asked


def shares(judge, clips, asked) -> dict[str, float]:
    found = judge.correct(clips, asked)
    return {name: float(found[name].mean()) for name in ("digit", "color", "direction")}


@pytest.mark.parametrize(("direction", "step"), DIRECTIONS.items())
def test_ink_moves_one_pixel_a_frame_and_stays_whole(direction, step):
    places = np.array(positions(direction))
    assert (np.diff(places, axis=0) == step).all()
    assert places.min() >= 0
    assert places.max() + GRID <= CANVAS
    clip = make_clip(np.ones((GRID, GRID)), "white", direction)
    assert clip.shape == (NUM_FRAMES, CANVAS, CANVAS, 3)
    assert clip.dtype == np.uint8
    assert (clip.sum(axis=(1, 2, 3)) == 255 * 3 * GRID**2).all()


def test_following_the_right_direction_brings_the_ink_back():
    ink, _ = real_digits()
    clips = np.stack([make_clip(ink[0], "white", "left")])
    assert np.abs(follow(clips, "left")[0, ..., 0] / 255 - ink[0]).max() < 0.01
    assert np.abs(follow(clips, "right")[0, ..., 0] / 255 - ink[0]).max() > 0.5


def test_pixels_and_back():
    clips = np.random.default_rng(0).integers(0, 256, (2, 9, 4, 4, 3), dtype=np.uint8)
    pixels = to_pixels(clips)
    assert pixels.shape == (2, 3, 9, 4, 4)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    back = to_clips((pixels.permute(0, 2, 3, 4, 1) + 1) / 2)
    assert (back == clips).all()


def test_training_clips_show_their_combination(digits):
    seen = {COMBINATIONS[c] for _, c in digits.entries}
    assert seen == set(COMBINATIONS)
    for ink, combination in digits.entries[::1000]:
        assert DIGITS[digits.labels[ink]] == COMBINATIONS[combination][1]
    assert digits[5] == digits.entries[5]


def test_judge_reads_real_clips(judge, real):
    found = shares(judge, *real)
    assert found["digit"] >= 0.99
    assert found["color"] == found["direction"] == 1.0


def test_judge_reads_clips_that_are_a_little_soft(judge, real):
    clips, asked = real
    soft = gaussian_filter(clips.astype(np.float32), (0, 0, 0.6, 0.6, 0)).round().astype(np.uint8)
    assert min(shares(judge, soft, asked).values()) >= 0.97
    sharp_distance = judge.read(clips).distances
    assert (judge.read(soft).distances > sharp_distance + 1).mean() > 0.9


def test_judge_says_no_to_what_was_not_asked_for(judge, real):
    clips, asked = real
    words = {**dict(zip(DIGITS, (*DIGITS[1:], DIGITS[0]))), "left": "up", "right": "down"}
    words |= {"up": "left", "down": "right", **dict(zip(COLORS, (*list(COLORS)[1:], "red")))}
    wrong = [" ".join(words.get(word, word) for word in prompt.split()) for prompt in asked]
    assert max(shares(judge, clips, wrong).values()) <= 0.01


def test_judge_sees_nothing_in_black_clips(judge):
    black = np.zeros((2, NUM_FRAMES, CANVAS, CANVAS, 3), np.uint8)
    assert judge.read(black).digits == [NOTHING, NOTHING]
    found = judge.correct(black, ["a red one moving up"] * 2)
    assert not found["digit"].any()
    assert found["reads_as"].tolist() == [NOTHING, NOTHING]


def test_aspects_that_a_prompt_does_not_name_are_masked(judge, real):
    clips = real[0][:3]
    found = judge.correct(clips, ["a colored three moving up", "a red digit", ""])
    assert np.ma.getmaskarray(found["digit"]).tolist() == [False, True, True]
    assert np.ma.getmaskarray(found["color"]).tolist() == [True, False, True]
    assert np.ma.getmaskarray(found["direction"]).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "clips", [np.zeros((1, 8, 16, 16, 3), np.uint8), np.zeros((1, 9, 16, 16, 3), np.float32)], ids=["frames", "dtype"]
)
def test_judge_refuses_other_clips(judge, clips):
    with pytest.raises(ValueError, match=r"`clips` must be \(n, 9, 16, 16, 3\) of 8 bits, got"):
        judge.read(clips)

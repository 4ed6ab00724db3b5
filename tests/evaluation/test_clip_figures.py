"""Figures of clips by their pixels."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ext.evaluation.clip_figures import (
    clip_drift,
    degenerate_clips,
    motion,
    spatial_correlation,
    temporal_smoothness,
)
from examples.digits.pictures import real_digits
from examples.moving_digits.clips import make_clip

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def crossing() -> np.ndarray:
    ink, _ = real_digits()
    return np.stack([make_clip(ink[index], "white", "right") for index in range(24)])


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return RNG.integers(0, 256, (4, 9, 16, 16, 3), dtype=np.uint8)


def gray(levels: list[int], size: int = 8) -> np.ndarray:
    """One clip of flat frames."""
    frames = np.array(levels, dtype=np.uint8).reshape(1, -1, 1, 1, 1)
    return np.broadcast_to(frames, (1, len(levels), size, size, 3)).copy()


def test_motion_and_drift_are_mean_changes():
    assert motion(gray([0, 51, 51])) == pytest.approx([0.1])
    assert clip_drift(gray([0, 51, 102]), gray([51, 51, 51])) == pytest.approx([0.4 / 3])
    assert motion(gray([7, 7, 7])) == 0
    assert clip_drift(gray([3, 4]), gray([3, 4])) == 0


def test_smoothness_of_known_clips(noise):
    assert temporal_smoothness(gray([0, 50, 100, 150])) == pytest.approx([1.0])
    assert temporal_smoothness(gray([0, 100, 0, 100])) == pytest.approx([0.0], abs=1e-6)
    assert temporal_smoothness(gray([9, 9, 9])) == 1.0
    # E|x1 - 2 x2 + x3| / 2 E|x2 - x1| of independent normal means is sqrt(3) / 2.
    assert temporal_smoothness(noise).mean() == pytest.approx(1 - 3**0.5 / 2, abs=0.03)


def test_smoothness_tells_a_steady_shape_from_broken_motion(crossing):
    steady = temporal_smoothness(crossing).mean()
    mixed = np.stack([crossing[RNG.permutation(len(crossing))[:9], range(9)] for _ in range(24)])
    shaken = np.stack([[np.roll(f, RNG.integers(-1, 2, 2), (0, 1)) for f in clip] for clip in crossing])
    flickering = (crossing * RNG.choice([0.5, 1.0], (24, 9, 1, 1, 1))).astype(np.uint8)
    assert steady > 0.55
    for broken in (mixed, shaken, flickering):
        assert temporal_smoothness(broken).mean() < steady - 0.2


def test_correlation_is_low_in_noise_alone(crossing, noise):
    assert (spatial_correlation(crossing) > 0.4).all()
    assert (np.abs(spatial_correlation(noise)) < 0.05).all()
    assert spatial_correlation(gray([5, 5])) == 1.0


def test_degenerate_clips_are_told_apart(crossing, noise):
    frozen = np.repeat(crossing[:1, 4:5], 9, axis=1)
    clips = np.concatenate([crossing[:1], gray([0] * 9, 16), gray([9] * 9, 16), frozen, noise[:1]])
    found = degenerate_clips(clips)
    assert {kind: flags.tolist() for kind, flags in found.items()} == {
        "blank": [False, True, True, False, False],
        "frozen": [False, False, False, True, False],
        "noise": [False, False, False, False, True],
    }


def test_a_clip_with_one_picture_in_it_is_not_blank(crossing):
    clip = np.zeros_like(crossing[:1])
    clip[:, 4] = crossing[0, 4]
    assert not degenerate_clips(clip)["blank"][0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: motion(gray([1])), "must have 2 frames at least, got 1"),
        (lambda: temporal_smoothness(gray([1, 2])), "must have 3 frames at least, got 2"),
        (lambda: motion(gray([1, 2])[0]), r"must be \(n, frames, height, width, 3\)"),
        (lambda: motion(gray([1, 2]).astype(np.float32)), "of 8 bits, got .* float32"),
        (lambda: clip_drift(gray([1, 2]), gray([1, 2], 4)), "`other` must have the shape of `base`"),
    ],
)
def test_other_arrays_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

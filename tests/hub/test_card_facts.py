from __future__ import annotations

import pytest

from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.kinds import slug


def test_a_licence_says_its_name():
    assert Licence("mit").sentence == "These files are shared under `mit`."
    named = Licence("other", "my-licence", "LICENSE.md")
    assert named.sentence == "These files are shared under [`my-licence`](LICENSE.md)."


def test_a_licence_without_a_name_is_refused():
    with pytest.raises(ValueError, match="`license_name` must be given with the license 'other'"):
        Licence("other")
    for nothing in ("", " ", None):
        with pytest.raises(ValueError, match="`license` must name a licence, got"):
            Licence(nothing)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_must_be_finite(value):
    with pytest.raises(ValueError, match=f"`value` must be finite, got {value} for 'drift'"):
        Measured("digits", "drift", value)


@pytest.mark.parametrize("value", ["0.5", None, True])
def test_figures_must_be_numbers(value):
    with pytest.raises(TypeError, match="`value` must be a number, got a "):
        Measured("digits", "drift", value)


@pytest.mark.parametrize("words", [("", "drift"), ("digits", " -_")])
def test_figures_must_say_what_they_are_of(words):
    with pytest.raises(ValueError, match="must hold a letter or a digit, got"):
        Measured(*words, 0.5)


def test_slugs():
    assert slug("Win rate, HPSv2 2.1 (mean)") == "win-rate-hpsv2-2-1-mean"
    assert slug("pixel_drift") == "pixel-drift"
    assert slug("数字 drift") == "数字-drift"

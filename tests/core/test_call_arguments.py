from __future__ import annotations

import re

import pytest

from diffusers_ext.core.call_arguments import check_number


def test_numbers_of_a_call():
    assert check_number("scale", -2) == -2
    for value, bounds, rule in (
        (float("nan"), (), "finite"),
        (-1.0, (0.0,), "finite and at least 0"),
        (1.5, (0.0, 1.0), "finite and in [0, 1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"`scale` must be {rule}, got {value}.")):
            check_number("scale", value, *bounds)
    for value in ("1", True, None):
        with pytest.raises(TypeError, match="`scale` must be a number, got a"):
            check_number("scale", value)

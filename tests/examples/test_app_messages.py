"""What the page says of errors: the tool, the cause, what to do; no names of arguments."""

from __future__ import annotations

import pytest
import torch

from examples.app_messages import EXPECTED, CannotDraw, message_for


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CannotDraw("The prompt is empty. Write what to draw."), "The prompt is empty. Write"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory for this model"),
        (ConnectionError("no route"), "neither on this machine nor reachable on the Hub"),
        (RuntimeError("x\nsize mismatch for y"), "'user/dog' was made for another model"),
        (FileNotFoundError("no weights in user/dog"), "A file of 'Taught subject' could not be read"),
        (ValueError("odd\nlong"), "'Taught subject' could not be drawn: odd"),
    ],
)
def test_a_message_says_what_happened(error, words):
    assert isinstance(error, EXPECTED)
    said = message_for(error, "Taught subject", "user/dog")
    assert words in said
    assert "\n" not in said


def test_what_the_app_made_itself_has_no_name():
    said = message_for(RuntimeError("size mismatch"), "Erased concept", None)
    assert "the file of this tool was made for another model" in said

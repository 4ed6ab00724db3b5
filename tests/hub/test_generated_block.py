from __future__ import annotations

import pytest

from diffusers_ext.hub.owner_text import find_generated, mark_generated, without_marks


def test_generated_words_are_found_between_others():
    text = "above\n" + mark_generated("# Title\n\nwords") + "\nbelow\n"
    found = find_generated(text)
    assert (found.before, found.after, found.edited) == ("above\n", "\nbelow\n", False)
    assert without_marks(found.words).strip() == "# Title\n\nwords"
    assert text.count("<!-- diffusers_ext:") == 2


def test_an_edit_is_noticed():
    text = mark_generated("a long sentence")
    assert find_generated(text.replace("long", "short")).edited
    assert not find_generated(
        text.replace("\n<!-- diffusers_ext:end", "\n\n<!-- diffusers_ext:end")
    ).edited


@pytest.mark.parametrize("broken", ["begin", "end"])
def test_a_part_without_one_of_its_marks_is_none(broken):
    text = mark_generated("words").replace(f"diffusers_ext:{broken}", "something else")
    assert find_generated(text) is None
    assert "diffusers_ext:" not in without_marks(text)


def test_a_lost_end_does_not_swallow_the_next_part():
    lost = mark_generated("first").replace("<!-- diffusers_ext:end -->", "")
    found = find_generated(f"{lost}\nowner\n" + mark_generated("second"))
    assert without_marks(found.words).strip() == "second"
    assert "owner" in found.before
    assert not found.edited


def test_marks_cannot_be_nested():
    with pytest.raises(ValueError, match="must not hold the marks of its generated part"):
        mark_generated(mark_generated("words"))

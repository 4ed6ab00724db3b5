from __future__ import annotations

import pytest

from diffusers_ext.core.concept_words import concept_spans, contains_concept, replace_concept


@pytest.mark.parametrize(
    ("prompt", "concept", "found"),
    [
        ("a red seven", "seven", ["seven"]),
        ("Seven. (SEVEN) seven's", "seven", ["Seven", "SEVEN", "seven"]),
        ("a panda  Bear runs", " panda bear ", ["panda  Bear"]),
        ("a scarf, a carpet, cars and a car", "car", ["car"]),
        ("C++, not C+", "c++", ["C++"]),
        ("a red eight", "seven", []),
        ("", "seven", []),
    ],
)
def test_whole_words_in_any_case(prompt, concept, found):
    assert [prompt[start:end] for start, end in concept_spans(prompt, concept)] == found
    assert contains_concept(prompt, concept) == bool(found)


@pytest.mark.parametrize(
    ("prompt", "concept", "other", "expected"),
    [
        ("a red seven moving, seven!", "seven", "digit", "a red digit moving, digit!"),
        ("Seven goes up", "seven", "digit", "Digit goes up"),
        ("by Van Gogh", "Van Gogh", "a painter", "by a painter"),
        ("a van  gogh", "Van Gogh", "painter", "a painter"),
        ("a panda in panda land", "panda", "bear", "a bear in bear land"),
        ("a car on a scarf", "car", r"\1 \g<0>", r"a \1 \g<0> on a scarf"),
    ],
)
def test_only_the_concept_is_replaced(prompt, concept, other, expected):
    assert replace_concept(prompt, concept, other) == expected


@pytest.mark.parametrize(
    ("prompt", "concept", "other", "message"),
    [
        ("two sevens", "seven", "digit", "must contain 'seven' as a whole word, got 'two sevens'"),
        ("a seven", "seven", " ", "must be words without 'seven' among them, got ' '"),
        ("a seven", "seven", "no Seven", "among them, got 'no Seven'"),
        ("a seven", "  ", "digit", "`concept` must be a word or a few words, got '  '"),
    ],
)
def test_replacements_that_mean_nothing(prompt, concept, other, message):
    with pytest.raises(ValueError, match=message):
        replace_concept(prompt, concept, other)

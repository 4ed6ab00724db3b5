from __future__ import annotations

import pytest
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from diffusers_ext.hub.card import render
from diffusers_ext.hub.kinds import KINDS, bibtex
from diffusers_ext.hub.owner_text import find_generated
from diffusers_ext.hub.safe_markdown import code, figure, one_line, plain, python_literal, shown
from tests.hub.card_examples import COMMON, FACTS


# What `artifact_card` adds to the facts that it is given.
RENDERED = {
    **COMMON,
    "name": "my-dog",
    "repo_id": "user/my-dog",
    "prefix": "",
    "where": '"user/my-dog"',
    "snapshot": 'snapshot_download("user/my-dog")',
    "on_hub": True,
    "noted": True,
    "citations": bibtex(("receler",), "1.2.3"),
}


def test_a_template_is_filled_between_its_marks():
    card = render("eraser", ModelCardData(license="mit"), **RENDERED, **FACTS["eraser"])
    assert type(card) is ModelCard
    assert card.data.license == "mit"
    assert "base_model" not in str(card).split("---")[1]
    found = find_generated(card.text)
    assert (found.before, found.after, found.edited) == ("\n", "\n", False)
    assert "# my-dog: dog, erased from somebody/base\n" in found.words


def test_a_header_of_data_makes_a_card_of_data():
    card = render("pair_data_set", DatasetCardData(), **RENDERED, **FACTS["pair_data_set"])
    assert type(card) is DatasetCard


@pytest.mark.parametrize("name", [*RENDERED, *FACTS["eraser"]])
def test_a_missing_fact_stops_the_rendering(name):
    facts = {key: value for key, value in {**RENDERED, **FACTS["eraser"]}.items() if key != name}
    if name in ("prefix", "snapshot", "repo_id"):  # of other templates
        render("eraser", ModelCardData(), **facts)
        return
    with pytest.raises(ValueError, match=f"'eraser' shows, got .*: '{name}' is undefined"):
        render("eraser", ModelCardData(), **facts)


def test_an_unknown_template():
    message = r"`template` must be one of \['eraser', .*'subject_pipeline'\], got 'x'"
    with pytest.raises(ValueError, match=message):
        render("x", ModelCardData())
    with pytest.raises(ValueError, match="`template` must be one of"):
        render("card_frame", ModelCardData())
    assert {kind.template for kind in KINDS.values()} == set(KINDS)


def test_words_show_exactly_themselves():
    assert plain("a_b <c>\n*d* | `e` [f](g)") == r"a\_b \<c\> \*d\* \| \`e\` \[f\](g)"
    assert code("a <b>") == "`a <b>`"
    assert code("a `b` ``c") == "```a `b` ``c```"
    assert code("`a`") == "`` `a` ``"
    assert code("") == "(empty)"
    assert one_line(" a\n\tb ") == "a b"
    for words in ("a", 'a "b"', "a\\n'\n\t", "数字 🧨"):
        assert eval(python_literal(words)) == words


def test_figures_are_short_and_whole_numbers_whole():
    found = [figure(value) for value in (0.123456, 1.0, 12345.6, 1234567, 0, 3.2e-7, -0.5)]
    assert found == ["0.1235", "1", "12,346", "1,234,567", "0", "3.2e-07", "-0.5"]


def test_pictures_are_shown_and_clips_linked():
    assert shown("a b/C.PNG") == "![a b/C.PNG](a%20b/C.PNG)"
    assert shown("clip_1.mp4") == r"[clip\_1.mp4](clip_1.mp4)"

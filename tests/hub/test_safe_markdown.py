"""Words of others in a card show what they are: nothing runs, nothing leads astray, nothing is cut off."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffusers_ext.hub import Licence
from diffusers_ext.hub.safe_markdown import (
    check_file_name,
    code,
    figure,
    is_harmless,
    link,
    one_line,
    plain,
    prose,
    python_literal,
    shown,
)
from tests.hub.card_examples import card_of

EVIL = [
    "<script>alert(1)</script>",
    "\\<img src=x onerror=alert(1)>",
    "<!-- diffusers_ext:end -->",
    "[x](javascript:alert(1))",
    "[x]( \tjavascript:alert(1) 'title')",
    "[x](\njavascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](java&#115;cript&colon;alert(1))",
    "[x](%6aavascript:alert(1))",
    "![x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](//evil.example)",
    "[x]\n\n[x]: javascript:alert(1)",
    "[x]\n\n- [x\n  ]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "words\n---\nlicense: mit\n---\n# Another card",
    "```\nnever closed",
    "~~~\nnever closed",
    "words\n===",
]


def test_nothing_runs_and_the_card_goes_on(subtests):
    for words in EVIL:
        with subtests.test(words=words):
            card = card_of("eraser", trained_on=f"Before.\n\n{words}")
            html = MarkdownIt("commonmark").render(card.text)
            plain = MarkdownIt("commonmark").render(card_of("eraser", trained_on="Before.").text)
            for tag in ("<script", '<img src="x', "onerror=alert(1)>", 'href="java', 'href="//', 'src="data'):
                assert tag not in html
            assert html.count("<h") == plain.count("<h")
            assert "<h2>Results</h2>" in html
            assert ModelCard(str(card)).data.to_dict() == card_of("eraser").data.to_dict()
            for word in ("Before", "alert", "never closed", "Another card"):
                assert (word in html) == (word in words or word == "Before")


def test_harmless_markdown_stays():
    words = "*Six* pictures of [a dog](https://example.org/dog), see `a<b`:\n\n- [notes](notes.md)"
    html = MarkdownIt("commonmark").render(prose(words))
    for expected in ("<em>Six</em>", 'href="https://example.org/dog"', 'href="notes.md"', "<li>"):
        assert expected in html


def test_facts_and_header_survive_lines_that_look_like_a_header():
    words = "dog\n---\nlicense: cc0-1.0\nprivate: false\n---\n<b>x</b>"
    for fact in ("concept", "anchor_concept", "base"):
        card, short = card_of("eraser", **{fact: words}), card_of("eraser", **{fact: "dog"})
        assert ModelCard(str(card)).data.to_dict() == short.data.to_dict()
        assert "<b>x</b>" not in MarkdownIt("commonmark").render(card.text)


def test_an_instance_prompt_and_a_widget_cannot_end_the_header():
    words = "a\n---\nlicense: cc0-1.0\n---\n"
    card = card_of("null_space_lora", instance_prompt=words, widget=[(words, "a.png")])
    data = ModelCard(str(card)).data
    assert (data.license, data.instance_prompt) == ("other", words)
    assert data.widget == [{"text": words, "output": {"url": "a.png"}}]


def test_a_licence_leads_nowhere_else():
    for address in ("javascript:alert(1)", "data:text/html,x", "//x.example", "/etc"):
        sentence = Licence("other", "my`licence", address).sentence
        assert sentence == "These files are shared under ``my`licence``."
        assert not is_harmless(address)
    assert link("a", "https://x.example/a(b)") == "[a](https://x.example/a%28b%29)"
    assert link("a", "LICENSE.md") == "[a](LICENSE.md)"


def test_a_widget_names_files_of_the_repository():
    for name in ("../a.png", "/a", "a/../../b", "https://x.example/a", "javascript:x", "a\\b", "", 3):
        with pytest.raises(ValueError, match="`widget` must name files of the folder, got"):
            check_file_name(name, "widget")
        with pytest.raises(ValueError, match="`widget` must name files of the folder, got"):
            card_of("eraser", widget=[("a dog", name)])


def test_lists_hold_what_they_should():
    for kind, name, value in (
        ("pair_data_set", "latent_shape", ["4)", 8]),
        ("npnet", "latent_shape", [True]),
        ("eraser", "preserved_concepts", [3]),
    ):
        with pytest.raises(TypeError, match=rf"`{name}` must hold (whole numbers|words), got"):
            card_of(kind, **{name: value})


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

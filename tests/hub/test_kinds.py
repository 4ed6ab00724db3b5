from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from diffusers_ext.hub import Licence, Measured, kinds
from diffusers_ext.hub.card import artifact_card
from diffusers_ext.hub.kinds import KINDS, bibtex, find_licence, public_name, slug
from tests.hub.card_examples import COMMON, FACTS, card_of


def test_figures_are_finite_numbers_of_something():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`value` must be finite, got {value} for 'drift'"):
            Measured("digits", "drift", value)
    for value in ("0.5", None, True):
        with pytest.raises(TypeError, match="`value` must be a number, got a "):
            Measured("digits", "drift", value)
    for words in (("", "drift"), ("digits", " -_")):
        with pytest.raises(ValueError, match="must hold a letter or a digit, got"):
            Measured(*words, 0.5)


def test_slugs():
    assert slug("Win rate, HPSv2 2.1 (mean)") == "win-rate-hpsv2-2-1-mean"
    assert slug("pixel_drift") == "pixel-drift"
    assert slug("数字 drift") == "数字-drift"


def test_every_missing_fact_is_refused_by_name(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            for name in COMMON:
                given = {key: value for key, value in COMMON.items() if key != name} | FACTS[kind]
                with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
                    artifact_card(kind, "user/name", **given)
            assert set(KINDS[kind].facts) == FACTS[kind].keys()
            for name in FACTS[kind]:
                given = {key: value for key, value in FACTS[kind].items() if key != name}
                with pytest.raises(ValueError, match=f"`{name}` must be given for a card of kind '{kind}', got only"):
                    artifact_card(kind, "user/name", **COMMON, **given)
                if name not in KINDS[kind].may_be_empty:
                    with pytest.raises(ValueError, match=f"`{name}` must say something in a card, got None"):
                        card_of(kind, **{name: None})
            with pytest.raises(ValueError, match=rf"'{kind}' must have no facts but .*, got \['colour'\]"):
                card_of(kind, colour="red")


def test_facts_that_say_nothing_are_refused(subtests):
    for kind, changes, error, message in [
        ("eraser", {"base": " "}, ValueError, "`base` must say something in a card, got ' '"),
        ("eraser", {"trained_on": ""}, ValueError, "`trained_on` must say something"),
        ("eraser", {"version": None}, ValueError, "`version` must say something"),
        ("eraser", {"licence": "mit"}, TypeError, "`licence` must be a Licence, got a str"),
        ("eraser", {"settings": {"betas": [1]}}, TypeError, "`settings` .* got a list for 'betas'"),
        ("eraser", {"results": [0.5]}, TypeError, "`results` must hold Measured, got a float"),
        ("eraser", {"widget": ["ab"]}, ValueError, "`widget` must hold pairs .* got 'ab'"),
        ("eraser", {"rank": "1,234"}, TypeError, "`rank` must be a whole number, got a str"),
        ("eraser", {"rank": True}, TypeError, "`rank` must be a whole number, got a bool"),
        ("eraser", {"concept": ["dog"]}, TypeError, "`concept` must be words, got a list"),
        ("eraser", {"preserved_concepts": "cow"}, TypeError, "`preserved_concepts` must be a list"),
        ("eraser", {"pipeline": "os; x"}, ValueError, "`pipeline` must be the name of a class"),
        ("npnet", {"any_size": "no"}, TypeError, "`any_size` must be True or False, got a str"),
        ("null_space_lora", {"directions": "x"}, ValueError, "`directions` must be one of .*'x'"),
    ]:
        with subtests.test(kind=kind, changes=changes, error=error, message=message):
            with pytest.raises(error, match=message):
                card_of(kind, **changes)


PAPERS = sorted({key for kind in KINDS.values() for key in kind.papers})


def test_every_entry_is_whole():
    text = bibtex(PAPERS, "1.2.3")
    assert text.count("{") == text.count("}")
    entries = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert entries == [*PAPERS, "diffusers_ext"]
    assert len(re.findall(r"arXiv:\d{4}\.\d{5}\}", text)) == len(PAPERS) == 7
    assert "version = {1.2.3}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_paper_is_cited_by_a_kind():
    kept = Path(kinds.__file__).with_name("templates") / "papers.bib"
    assert sorted(re.findall(r"^@article\{(\w+),$", kept.read_text(), re.MULTILINE)) == PAPERS
    assert bibtex((), "1.2.3").startswith("@software{diffusers_ext,")


def put_card(repo_id: str, header: str, private: bool = False) -> None:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    content = f"---\n{header}\n---\n\nWords.\n".encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=repo_id)


def test_the_public_name_holds_no_path():
    for source, name in (
        ("user/model", "user/model"),
        ("model", "model"),
        ("/somewhere/else/model", "model"),
        ("../models/model", "model"),
        ("a/b/model", "model"),
        ("/cache/hub/models--user--a-model/snapshots/1f/transformer", "user/a-model"),
        ("/cache/hub/datasets--user--pairs/snapshots/1f", "user/pairs"),
    ):
        assert public_name(source) == name


def test_a_folder_goes_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "user" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("user/model") == "model"
    assert public_name(Path("user")) == "user"


def test_a_given_licence_is_taken_without_network(tmp_path):
    assert find_licence(tmp_path, "mit") == Licence("mit")
    own = Licence("other", "own", "https://a.b")
    assert find_licence("any", own) is own
    with pytest.raises(ValueError, match="`license_name` must be given with the license 'other'"):
        find_licence("any", "other")


def test_the_licence_of_the_base_model(hub):
    put_card("tester/base", "license: apache-2.0")
    assert find_licence("tester/base") == Licence("apache-2.0")
    put_card("tester/own", "license: other\nlicense_name: own-1\nlicense_link: LICENSE.md")
    link = f"{hub.endpoint}/tester/own/blob/main/LICENSE.md"
    assert find_licence("tester/own") == Licence("other", "own-1", link)
    put_card("tester/closed", "license: openrail++", private=True)
    assert find_licence("tester/closed", token="hf_test") == Licence("openrail++")
    cached = "/cache/models--tester--closed/snapshots/1f"
    assert find_licence(cached) == Licence("openrail++")


def test_the_licence_in_a_folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n")
    assert find_licence(tmp_path) == Licence("mit")  # the link led nowhere from elsewhere


def test_no_licence_is_asked_for(hub, tmp_path):
    for header in (None, "tags: [a]", "license: other", "license: [mit, gpl]", "license: null"):
        if header is not None:
            put_card("tester/unclear", header)
        for base in ("tester/unclear", "a label", "label", tmp_path):
            with pytest.raises(ValueError, match="`license` must be given, got None, and the card"):
                find_licence(base)
    with pytest.raises(ValueError, match="`license` must be given"):
        find_licence("tester/closed-off", token="hf_stranger")


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

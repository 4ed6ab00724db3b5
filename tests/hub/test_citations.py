from __future__ import annotations

import re

from diffusers_ext.hub.kinds import KINDS, PAPERS, bibtex


def test_every_entry_is_whole():
    text = bibtex(tuple(PAPERS), "1.2.3")
    assert text.count("{") == text.count("}")
    entries = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert entries == [*PAPERS, "diffusers_ext"]
    assert re.findall(r"arXiv:(\S+)\}", text) == [number for *_, number in PAPERS.values()]
    assert "version = {1.2.3}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_kind_cites_the_papers_of_its_method():
    assert {key for kind in KINDS.values() for key in kind.papers} == PAPERS.keys()
    assert bibtex((), "1.2.3").startswith("@software{diffusers_ext,")

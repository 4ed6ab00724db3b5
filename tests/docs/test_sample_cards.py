from __future__ import annotations

from diffusers_ext.hub.kinds import KINDS
from docs.sample_cards import FACTS, ROOT, sample_card


def test_every_kind_has_a_sample_that_is_up_to_date():
    assert FACTS.keys() == KINDS.keys()
    paths = set(ROOT.glob("hub_cards/*.md")) - {ROOT / "hub_cards" / "README.md"}
    cards = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    expected = {kind: sample_card(kind) for kind in KINDS}
    assert cards == expected, "run `python docs/sample_cards.py`"

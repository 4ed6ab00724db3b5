"""Cards for what this project shares on the Hub: what it is, how to use it, what was measured."""

from hub_cards.artifact_card import artifact_card
from hub_cards.card_facts import Licence, Measured
from hub_cards.kinds import KINDS, Kind
from hub_cards.owner_words import keep_owner_words
from hub_cards.render import render


__all__ = [
    "KINDS",
    "Kind",
    "Licence",
    "Measured",
    "artifact_card",
    "keep_owner_words",
    "render",
]

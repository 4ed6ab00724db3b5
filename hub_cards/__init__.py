"""Model cards for what the training scripts upload."""

from hub_cards.render import render


__all__ = ["render"]

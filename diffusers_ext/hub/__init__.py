"""What is shared on the Hub, and the card that tells what it is, how to use it and what was measured."""

from diffusers_ext.hub.kinds import Licence, Measured

__all__ = ["Licence", "Measured"]

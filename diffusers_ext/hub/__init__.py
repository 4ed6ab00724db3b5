"""What is shared on the Hub, and the card that tells what it is, how to use it and what was measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_ext.hub.kinds import Licence, Measured

__all__ = ["Licence", "Measured"]


def __getattr__(name: str) -> Any:
    """A public name, for which the Hub's library is imported: settings read `facts` without it."""
    if name in __all__:
        return getattr(import_module("diffusers_ext.hub.kinds"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

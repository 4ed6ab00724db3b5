"""What went wrong in the app, in the words of somebody who only sees the page."""

from __future__ import annotations

import torch
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError


class CannotDraw(ValueError):
    """What a visitor can mend: a field of the page; its text is shown as it is."""


# What the app cannot draw for, by the first class that fits.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, SafetensorError, LookupError)
_MISFIT = ("size mismatch", "shape", "Target modules", "No LoRA keys", "not found in the base")


def message_for(error: Exception, tool: str, artifact: str | None) -> str:
    """One or two sentences: what happened, and what to do.

    Args:
        error: one of `EXPECTED`.
        tool: the one that was asked for.
        artifact: where its LoRA, network or eraser comes from; `None` where the app made it.
    """
    shown = f"{artifact!r}" if artifact else "the file of this tool"
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, CannotDraw):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "There is not enough memory for this model. Close other programs that use the same "
            "device, or start the app with a smaller model."
        )
    if isinstance(error, (RepositoryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        return (
            f"A model of {tool!r} is neither on this machine nor reachable on the Hub: "
            f"{first_line} Check its name and the connection, then draw again."
        )
    if any(words in str(error) for words in _MISFIT):
        return (
            f"{tool!r} cannot be shown: {shown} was made for another model ({first_line}). Start "
            "the app with the model that it belongs to."
        )
    if isinstance(error, (OSError, SafetensorError)):
        return f"A file of {tool!r} could not be read: {first_line} Look at the names that the app was started with."
    return f"{tool!r} could not be drawn: {first_line}"

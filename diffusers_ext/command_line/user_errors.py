"""Errors that tell the user what to change; all others are defects and keep their traceback."""

from __future__ import annotations


def user_errors() -> tuple[type[BaseException], ...]:
    """Wrong input, missing files or extras, refusals of the Hub, a lost connection, no memory."""
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    # What the Hub lacks or refuses is an `OSError`, a lost connection is not.
    return (ValueError, TypeError, OSError, ImportError, httpx.HTTPError, SafetensorError,
            OutOfMemoryError)  # fmt: skip

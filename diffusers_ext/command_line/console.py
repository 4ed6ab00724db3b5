"""What a command lets through to the terminal: its own words on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever is printed on the way goes to stderr, so that stdout holds the outcome alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def hub_in_one_try() -> Iterator[None]:
    """A Hub that cannot be reached is given up at once, see `diffusers_ext.core.hub_connection`."""
    from diffusers_ext.core.hub_connection import one_try_to_connect

    with one_try_to_connect():
        yield


@contextlib.contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Logs of this package on stderr, or, where `quiet`, errors alone and no bars or warnings.

    Everything comes back as it was.
    """
    logger = logging.getLogger("diffusers_ext")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with _silenced() if quiet else contextlib.nullcontext():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import disable_progress_bars as disable_hub_bars
    from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    hub_level = hub_logging.get_verbosity()
    bars = [library.is_progress_bar_enabled() for library in libraries]
    hub_bars = not are_progress_bars_disabled()
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        disable_hub_bars()
        hub_logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
        hub_logging.set_verbosity(hub_level)
        if hub_bars:
            enable_hub_bars()

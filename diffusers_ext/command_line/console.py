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
    """Logs and warnings of this package on stderr, and errors alone of the libraries below it.

    Everything comes back as it was.

    Args:
        quiet: errors alone of this package too, and no progress bars.
    """
    logger = logging.getLogger("diffusers_ext")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with warnings.catch_warnings():
            module = "" if quiet else r"(?!diffusers_ext\b)"
            warnings.filterwarnings("ignore", module=module)
            with _errors_alone(), _no_bars() if quiet else contextlib.nullcontext():
                yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging, hub_logging)
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import disable_progress_bars as disable_hub_bars
    from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    bars = [library.is_progress_bar_enabled() for library in libraries]
    hub_bars = not are_progress_bars_disabled()
    try:
        for library in libraries:
            library.disable_progress_bar()
        disable_hub_bars()
        yield
    finally:
        for library, bar in zip(libraries, bars, strict=True):
            if bar:
                library.enable_progress_bar()
        if hub_bars:
            enable_hub_bars()

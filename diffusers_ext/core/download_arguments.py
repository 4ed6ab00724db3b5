"""The keywords of a download, refused alike for a folder on disk and for a name on the Hub."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any


DOWNLOAD_ARGUMENTS = (
    "revision", "cache_dir", "token", "local_files_only", "force_download",
    "endpoint", "etag_timeout", "headers", "library_name", "library_version", "user_agent",
)  # fmt: skip


def check_download_arguments(arguments: Mapping[str, Any], function: str) -> None:
    """Raise `TypeError` where a keyword is none of a download, whether or not one takes place.

    Args:
        arguments: what a loader got as `**download_arguments`.
        function: name of the loader, as the user calls it.
    """
    for name in arguments:
        if name not in DOWNLOAD_ARGUMENTS:
            close = difflib.get_close_matches(name, DOWNLOAD_ARGUMENTS, 1)
            meant = f" Did you mean `{close[0]}`?" if close else ""
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}: of a download it takes "
                f"{', '.join(DOWNLOAD_ARGUMENTS[:5])}.{meant}"
            )

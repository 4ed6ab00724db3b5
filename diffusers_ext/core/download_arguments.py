"""The keywords of a download, refused alike for a folder on disk and for a name on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ext.core.suggestions import check_keywords


DOWNLOAD_ARGUMENTS = (
    "revision", "cache_dir", "token", "local_files_only", "force_download",
    "endpoint", "etag_timeout", "headers", "library_name", "library_version", "user_agent",
)  # fmt: skip


def check_download_arguments(arguments: Mapping[str, Any], function: str) -> None:
    """Raise `TypeError` where a keyword is none of a download, whether or not one takes place."""
    takes = f"of a download it takes {', '.join(DOWNLOAD_ARGUMENTS[:5])}"
    check_keywords(arguments, DOWNLOAD_ARGUMENTS, function, takes)

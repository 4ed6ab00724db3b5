"""A checksum of a JSON config within the config itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from diffusers_ext.hub.upload_files import CONFIG_DIGEST, config_digest


# Name in the metadata of a weights file of the digest of the config that it was saved beside.
CONFIG_KEY = "diffusers_ext.config_sha256"
_SHA256 = re.compile("[0-9a-f]{64}")


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal digits; an empty string is none."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_config_digest(config: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raise `ValueError` where a config holds a digest of itself that is none or does not fit."""
    if CONFIG_DIGEST not in config:
        return  # written before there was one
    if not is_sha256(config[CONFIG_DIGEST]):
        raise ValueError(
            f"`{CONFIG_DIGEST}` must be a SHA-256 of 64 hexadecimal digits, got "
            f"{config[CONFIG_DIGEST]!r} in {path}. Download or write it again."
        )
    if config[CONFIG_DIGEST] != config_digest(config):
        raise ValueError(
            f"{path} must have the contents that it was written with, got others: its "
            f"`{CONFIG_DIGEST}` does not fit. Download or write it again."
        )


def check_format_version(config: Mapping[str, Any], path: str | os.PathLike, newest: int) -> None:
    """Raise `ValueError` where a config is of no format, or of one that only a newer version reads."""
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"`format_version` must be a positive integer, got {version!r} in {path}.")
    if version > newest:
        raise ValueError(
            f"`format_version` must be at most {newest}, got {version} in {path}. Update "
            "diffusers_ext."
        )

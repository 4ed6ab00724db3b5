"""A checksum of a JSON config within the config itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


CONFIG_DIGEST = "config_sha256"


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config's contents, however it is indented or ordered, without the digest itself."""
    kept = {key: value for key, value in config.items() if key != CONFIG_DIGEST}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

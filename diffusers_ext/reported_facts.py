"""What a `training_report.json` tells for a card: a stranger's words, as far as they are about the artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_ext.core.text_files import read_json
from diffusers_ext.hub.upload_files import path_inside
from diffusers_ext.nullspace.lora_upload import measured_drift
from diffusers_ext.nullspace.statistics import FeatureStatistics


REPORT_NAME = "training_report.json"
# Where, under whose name and for whom something is uploaded is said by who uploads it alone.
_FACTS = (
    "base_model", "license", "trained_on", "settings", "widget", "instance_prompt", "pipeline",
    "directions", "concept", "anchor_concept", "preserved_concepts", "reward",
)  # fmt: skip


def reported_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """Facts for the card that a training left beside its result; none where there is no report.

    Args:
        folder: that is to be uploaded, possibly somebody else's.

    Raises:
        ValueError: the report holds something that is no fact of a card, such as `private` or
            `token`, or it names files outside of the folder.
    """
    path = Path(folder, REPORT_NAME)
    if not path.is_file():
        return {}
    report = _read(path_inside(folder, REPORT_NAME))
    card = report.get("card", {})
    _check_card(card, path)
    facts = dict(card)
    if "widget" in facts:
        facts["widget"] = _widget(facts["widget"], Path(folder), path)
    drifts = report.get("predicted_drift")
    if drifts:
        facts["results"] = measured_drift(_drifts(drifts, path), own_statistics(folder))
    return facts


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)


def own_statistics(folder: str | os.PathLike) -> FeatureStatistics:
    """The statistics in a folder's `statistics/`, if its files are not links to elsewhere."""
    for name in ("config.json", FeatureStatistics.weights_name):
        path_inside(folder, f"statistics/{name}")
    return FeatureStatistics.from_pretrained(Path(folder, "statistics"))


def _check_card(card: Any, path: Path) -> None:
    if not isinstance(card, dict):
        raise ValueError(f"`card` of {path} must be an object, got {type(card).__name__}.")
    for name, value in card.items():
        if name not in _FACTS:
            raise ValueError(
                f"`card` of {path} must hold facts about the result, got {name!r}, which is none of "
                f"{list(_FACTS)}. Give what concerns the upload itself in the call."
            )
        if name != "widget" and not _is_plain(value, name == "settings"):
            raise ValueError(
                f"`card.{name}` of {path} must be words or numbers, got {value!r:.80}."
            )


def _is_plain(value: Any, may_be_named: bool) -> bool:
    if isinstance(value, dict):
        return may_be_named and not any(isinstance(item, (dict, list)) for item in value.values())
    items = value if isinstance(value, list) else [value]
    return not may_be_named and not any(isinstance(item, (dict, list)) for item in items)


def _widget(widget: Any, folder: Path, path: Path) -> list[tuple[str, str]]:
    pairs = widget if isinstance(widget, list) else [None]
    for pair in pairs:
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, str]:
            raise ValueError(
                f"`card.widget` of {path} must hold pairs of prompt and file, got {pair!r:.80}."
            )
        path_inside(folder, pair[1])
    return [(prompt, file) for prompt, file in pairs]


def _drifts(drifts: Any, path: Path) -> Mapping[str, float]:
    values = list(drifts.values()) if isinstance(drifts, dict) else [drifts]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise ValueError(f"`predicted_drift` of {path} must be numbers, got {drifts!r:.80}.")
    return drifts

"""Join a new card with the one that is on the Hub, so that its owner's words stay."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from hub_cards.automatic_cards import is_automatic
from hub_cards.card_facts import Licence
from hub_cards.generated_block import find_generated, mark_generated, without_marks


_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_LICENCE_KEYS = ("license", "license_name", "license_link")
# What a new card writes only where nobody has said it; of everything else the new card's word counts.
_OWNERS_KEYS = ("pipeline_tag", "task_categories")


def keep_owner_words(new: ModelCard | DatasetCard, old_text: str | None) -> ModelCard | DatasetCard:
    """A new card with what the owner of the old one wrote; neither is changed.

    Words outside of the generated part stay where they are; so do the generated parts about other
    subfolders. A generated part that the owner edited stays as the owner's, above the new one. A card
    without such a part keeps all of its words above the new one, unless they are what diffusers,
    transformers or PEFT write by themselves. In the header the owner's licence, language, thumbnail and
    task win, and every key that the new card has not; tags and measured figures are united.

    Args:
        new: as `artifact_card` makes it.
        old_text: of the README.md that is there; `None` without one.

    Raises:
        ValueError: the old header cannot be read, or the new card is no generated one.
    """
    block = find_generated(new.text)
    if block is None:
        raise ValueError("`new` must be a card of `artifact_card`, got one without its marks.")
    if old_text is None or not old_text.strip():
        return new
    line_end = "\r\n" if "\r\n" in old_text else "\n"
    old_header, old_body = _split(old_text.removeprefix("\ufeff").replace("\r\n", "\n"))
    new_header = new.data.to_dict()
    header = _join_headers(new_header, old_header)
    words = without_marks(block.words)
    if _licence(header) != _licence(new_header):
        words = words.replace(_licence(new_header).sentence, _licence(header).sentence)
    body = _join_bodies(mark_generated(words, block.subfolder), old_body, block.subfolder)
    content = f"---\n{yaml_dump(header, sort_keys=False).strip()}\n---\n{body}"
    return type(new)(content.replace("\n", line_end))


def _split(text: str) -> tuple[dict[str, Any], str]:
    found = _HEADER.match(text)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"The header of the README.md on the Hub must be YAML, got: {error}. Mend it there."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            "The header of the README.md on the Hub must hold keys and values, got a "
            f"{type(header).__name__}. Mend it there."
        )
    return header, text[found.end() :]


def _join_bodies(block: str, old_body: str, subfolder: str) -> str:
    found = find_generated(old_body, subfolder)
    if found is None:
        words = without_marks(old_body, subfolder)
        return f"\n{block}\n" if is_automatic(words) else f"{words.rstrip()}\n\n{block}\n"
    before, after = (without_marks(words, subfolder) for words in (found.before, found.after))
    if found.edited:
        before = f"{before}{without_marks(found.words).strip()}\n\n"
    return f"{before}{block}{after}"


def _join_headers(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    joined = {**old, **new}
    if old.get("license") and (old["license"] != "other" or old.get("license_name")):
        joined |= {key: old.get(key) for key in _LICENCE_KEYS}
    joined |= {key: old[key] for key in _OWNERS_KEYS if old.get(key)}
    if "tags" in old and "tags" in new:
        joined["tags"] = list(dict.fromkeys([*_listed(old["tags"]), *new["tags"]]))
    if "configs" in old and "configs" in new:
        ours = [config["config_name"] for config in new["configs"]]
        kept = [c for c in _listed(old["configs"]) if _name(c) not in ours]
        joined["configs"] = [*new["configs"], *kept]
    if "model-index" in old and "model-index" in new:
        joined["model-index"] = _join_results(new["model-index"], old["model-index"])
    return {key: value for key, value in joined.items() if value is not None}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _name(config: Any) -> Any:
    return config.get("config_name") if isinstance(config, dict) else None


def _licence(header: dict[str, Any]) -> Licence:
    names = ", ".join(str(name) for name in _listed(header["license"]))
    return Licence(names, header.get("license_name"), header.get("license_link"))


def _join_results(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both cards' figures; of the same metric on the same data, the new ones."""
    try:
        ours = ModelCardData(**{"model-index": new})
        theirs = ModelCardData(**{"model-index": old})
    except ValueError as error:
        raise ValueError(
            f"`model-index` of the README.md on the Hub must be readable, got: {error} Mend it there."
        ) from error

    def key(result: Any) -> tuple[Any, ...]:
        return (*result.unique_identifier, result.metric_type, result.metric_config)

    measured = {key(result) for result in ours.eval_results}
    kept = [result for result in theirs.eval_results or [] if key(result) not in measured]
    ours.eval_results = [*ours.eval_results, *kept]
    return ours.to_dict()["model-index"]

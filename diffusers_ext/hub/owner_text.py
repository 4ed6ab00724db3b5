"""Join a new card with the one that is on the Hub, so that its owner's words stay."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from diffusers_ext.hub.kinds import Licence

_END = "<!-- diffusers_ext:end -->"
_NOTE = "<!-- Generated, down to the end mark: the next push replaces it. Write your own words above or below. -->"
_BLOCK = re.compile(
    r"^<!-- diffusers_ext:begin ([0-9a-f]{12})(?: of (\S+))? -->[ \t]*\n"
    r"((?:(?!<!-- diffusers_ext:begin).*\n)*?)"
    r"<!-- diffusers_ext:end -->[ \t]*$",
    re.MULTILINE,
)
_MARK = re.compile(r"^<!-- diffusers_ext:(begin|end).*\n?", re.MULTILINE)
# Lines of the templates of diffusers and PEFT, and of earlier versions of this package.
_LINES = re.compile(
    r"This is the model card of a \W+ (diffusers|transformers) .*automatically generated\.?"
    r"|<!-- This model card has been generated automatically .*"
    r"|should probably proofread and complete it, then remove this comment\. -->"
    r"|## Intended uses & limitations|#### How to use|#### Limitations and bias"
    r"|## Training details|```(python)?|# TODO: add an example code snippet .*"
    r"|\[TODO: .*\]"
    r"|## Training procedure|### Framework versions|- PEFT \d\S*"
    r"|Noise pairs: `diffusers_ext\S*open_pairs` reads the noises, `datasets` the tables\."
)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_LICENCE_KEYS = ("license", "license_name", "license_link")
# What a new card writes only where nobody has said it; of everything else the new card's word counts.
_OWNERS_KEYS = ("pipeline_tag", "task_categories")


class GeneratedBlock(NamedTuple):
    """One generated part found in a text."""

    before: str
    words: str  # between the marks
    after: str
    edited: bool  # whether somebody has changed the words since
    subfolder: str  # that they are about; empty for the root of the repository


def mark_generated(words: str, subfolder: str = "") -> str:
    """Words between marks, a part for each subfolder; a digest in the first mark tells whether they were edited."""
    if _MARK.search(words):
        raise ValueError("A card's text must not hold the marks of its generated part, got one.")
    words = f"{_NOTE}\n\n{words.strip()}\n"
    about = f" of {quote(subfolder)}" if subfolder else ""
    return f"<!-- diffusers_ext:begin {_digest(words)}{about} -->\n{words}{_END}"


def find_generated(text: str, subfolder: str | None = None) -> GeneratedBlock | None:
    """The first generated part of a text, about `subfolder` if given; `None` without one."""
    for found in _BLOCK.finditer(text):
        digest, about, words = found.groups()
        about = unquote(about or "")
        if subfolder in (None, about):
            before, after = text[: found.start()], text[found.end() :]
            return GeneratedBlock(before, words, after, _digest(words) != digest, about)
    return None


def without_marks(words: str, subfolder: str | None = None) -> str:
    """Words without the marks in them and the remark for the owner; parts about other subfolders stay."""
    pieces, end = [], 0
    for found in _BLOCK.finditer(words) if subfolder is not None else ():
        if unquote(found[2] or "") != subfolder:
            pieces += [_without_marks(words[end : found.start()]), found[0]]
            end = found.end()
    return "".join([*pieces, _without_marks(words[end:])])


def _without_marks(words: str) -> str:
    return _MARK.sub("", words).replace(f"{_NOTE}\n", "")


def _digest(words: str) -> str:
    return hashlib.sha256(words.strip().encode()).hexdigest()[:12]


def is_automatic(body: str) -> bool:
    """Whether every line of a card's text is one that a library wrote; true of an empty text."""
    lines = {line.strip() for line in body.splitlines()} - {""}
    return all(line in _template_lines() or _LINES.fullmatch(line) for line in lines)


@cache
def _template_lines() -> frozenset[str]:
    text = ModelCard.from_template(ModelCardData()).text
    return frozenset(line.strip() for line in text.splitlines())


def keep_owner_words(new: ModelCard | DatasetCard, old_text: str | None) -> ModelCard | DatasetCard:
    """A new card with what the owner of the README.md that is there wrote; neither is changed.

    Words outside of the generated part stay where they are; so do the generated parts about other subfolders. A
    generated part that the owner edited stays as the owner's, above the new one. A card without such a part keeps all
    of its words above the new one, unless they are what diffusers, transformers or PEFT write by themselves. In the
    header the owner's licence, language, thumbnail and task win, and every key that the new card has not; tags and
    measured figures are united. `ValueError` where the old header cannot be read.
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

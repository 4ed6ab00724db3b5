"""The card of an artifact: a header for the Hub and a text for people, joined with what its owner wrote there."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusers_ext.hub.kinds import (
    HUB_NAME,
    KINDS,
    Kind,
    Licence,
    Measured,
    bibtex,
    check_common,
    check_facts,
    draws_clips,
    find_licence,
    public_name,
    slug,
)
from diffusers_ext.hub.safe_markdown import code, count, figure, plain, prose, python_literal, shown

Card = ModelCard | DatasetCard

_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
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


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {function.__name__: function for function in (plain, code, count, figure, prose, shown)}
    environment.filters |= {**filters, "py": python_literal}
    return environment


def _model_header(
    kind: Kind,
    model_name: str,
    base_model: str | None,
    licence: Licence,
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
) -> ModelCardData:
    tags = [*kind.tags]
    if facts.get("directions", "plain") != "plain":
        tags.append("null-space-lora")
    if "concept-erasure" in tags and facts["pipeline"].startswith("CogVideoX"):
        tags.append("cogvideox")
    evaluated = [
        EvalResult(
            task_type=kind.task(facts) or "other",
            dataset_type=slug(result.dataset),
            dataset_name=result.dataset,
            metric_type=slug(result.metric),
            metric_value=float(result.value),
            metric_name=result.name or result.metric,
        )
        for result in results
    ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation=kind.relation if base_model else None,
        library_name=kind.library_name,
        pipeline_tag=kind.task(facts),
        **vars(licence),
        instance_prompt=facts.get("instance_prompt") or None,
        tags=tags,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in widget] or None,
        model_name=model_name if evaluated else None,
        eval_results=evaluated or None,
    )


def _data_set_header(kind: Kind, licence: Licence, num_rows: int, prefix: str) -> DatasetCardData:
    """By which `datasets` finds the tables of a repository with noise pairs."""
    size = next((name for most, name in _SIZES.items() if num_rows < most), "n>10M")
    return DatasetCardData(
        **vars(licence),
        task_categories=["text-to-image"],
        size_categories=[size],
        tags=[*kind.tags],
        configs=[
            {"config_name": "pairs", "default": True, "data_files": f"{prefix}pairs/*.parquet"},
            {"config_name": "rejected", "data_files": f"{prefix}rejected/*.parquet"},
        ],
    )


def artifact_card(
    kind: str,
    repo_id: str,
    *,
    base: str,
    licence: Licence,
    trained_on: str,
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    version: str,
    subfolder: str | None = None,
    **facts: Any,
) -> Card:
    """The card of one artifact, without network. What nobody says is an error, not a gap.

    Args:
        kind: a key of `KINDS`, whose own facts are all of `facts`.
        base: Hub name of the base model, or a label for one that is not on the Hub.
        trained_on: what it was made from, as Markdown.
        settings: how it was made: names and numbers or words; empty leaves the table out.
        results: what was measured; empty says that nothing was.
        widget: prompts with the picture or clip of each, a file of the repository; may be empty.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    found = KINDS[kind]
    texts = {"base": base, "trained_on": trained_on, "version": version}
    check_common(repo_id, texts, licence, settings, results, widget)
    check_facts(kind, found, facts)
    name, subfolder = repo_id.split("/")[1], (subfolder or "").strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    on_hub = bool(HUB_NAME.fullmatch(base))
    if found.repo_type == "dataset":
        card_class, data = DatasetCard, _data_set_header(found, licence, facts["num_pairs"], prefix)
    else:
        base_model = base if on_hub else None
        data = _model_header(found, name, base_model, licence, results, widget, facts)
        card_class = ModelCard
    # The arguments of a `from_pretrained`, and a downloaded folder for what has no `subfolder`.
    where, snapshot = python_literal(repo_id), f"snapshot_download({python_literal(repo_id)})"
    if subfolder:
        where += f", subfolder={python_literal(subfolder)}"
        snapshot += f" + {python_literal('/' + subfolder)}"
    template = _environment().get_template(f"{kind}.jinja")
    words = template.render(
        name=f"{name}/{subfolder}" if subfolder else name,
        repo_id=repo_id,
        prefix=prefix,
        where=where,
        snapshot=snapshot,
        base=base,
        on_hub=on_hub,
        licence=licence,
        trained_on=trained_on.strip(),
        settings=settings,
        results=results,
        noted=any(result.notes for result in results),
        widget=widget,
        version=version,
        citations=bibtex(found.papers, version),
        drawn="clip = pipeline({}).frames[0]" if draws_clips(facts) else "image = pipeline({}).images[0]",
        **facts,
    )
    words = re.sub(r"\n{3,}", "\n\n", words.replace("\r\n", "\n"))
    return card_class(f"---\n{data.to_yaml()}\n---\n\n{mark_generated(words, subfolder)}\n")


def make_card(
    kind: str,
    *,
    base_model: str | os.PathLike | None = None,
    license: str | Licence | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str]] = (),
    token: str | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """A card but for the name of its repository, as `push_folder` takes it.

    Args:
        base_model: Hub name or folder of the model that the artifact is for; of a folder the card names only the last
            part.
        license: as of the base model when `None`.
        widget: (prompt, file of the folder to upload) of pictures or clips to show.
        token: to read the base model's card.
        facts: those of the kind; `None` stands for a fact that is not known, which is a `ValueError`.
    """
    known = {"base_model": base_model, "trained_on": trained_on, **facts}
    missing = sorted(name for name, value in known.items() if value is None)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise ValueError(
            f"{names} must be given for the card, got None. An upload of kind {kind!r} tells what it "
            "is and where it comes from: pass these facts with the other arguments."
        )
    given = {"kind": kind, "base": public_name(base_model), "trained_on": trained_on, **facts}
    given["licence"] = find_licence(base_model, license, token=token)
    given |= {"settings": dict(settings or {}), "results": tuple(results)}
    given["version"] = sys.modules["diffusers_ext"].__version__  # whole by now, unlike at import

    def card(repo_id: str, subfolder: str | None = None) -> Card:
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        pictures = [(prompt, f"{prefix}{file}") for prompt, file in widget]
        return artifact_card(repo_id=repo_id, widget=pictures, subfolder=subfolder, **given)

    card("user/name")  # what is wrong with the facts stops here, before anything is written
    return card


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


def keep_owner_words(new: Card, old_text: str | None) -> Card:
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
        kept = [c for c in _listed(old["configs"]) if not (isinstance(c, dict) and c.get("config_name") in ours)]
        joined["configs"] = [*new["configs"], *kept]
    if "model-index" in old and "model-index" in new:
        joined["model-index"] = _join_results(new["model-index"], old["model-index"])
    return {key: value for key, value in joined.items() if value is not None}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


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

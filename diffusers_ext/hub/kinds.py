"""The kinds of artifacts that have a card, what each card must be told, and whom it cites."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from diffusers_ext.hub.connection import RemoteEntryNotFoundError
from diffusers_ext.hub.facts import check_fact
from diffusers_ext.hub.safe_markdown import check_file_name, code, link

_CARD_NAME = "README.md"
# Begin the name of a repository's folder in the cache of the Hub, whose files are links to `blobs`.
CACHED_FOLDERS = ("models--", "datasets--")


@dataclass(frozen=True)
class Licence:
    """A licence by the Hub's three header keys.

    Args:
        license: identifier of the Hub's list, as `"apache-2.0"`; `"other"` for any further one.
        license_name: identifier of a licence that is not on the list.
        license_link: its address, or a file of the repository.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.license, str) or not self.license.strip():
            raise ValueError(f"`license` must name a licence, got {self.license!r}.")
        if self.license == "other" and not self.license_name:
            raise ValueError(
                "`license_name` must be given with the license 'other', got "
                f'{self.license_name!r}. Pass `Licence("other", "its-name", "https://its.address")`, '
                "or none where the base model is on the Hub and its card tells."
            )

    @property
    def sentence(self) -> str:
        """What a card's text says about it."""
        name = code(self.license_name or self.license)
        return f"These files are shared under {link(name, self.license_link)}."


def public_name(source: str | os.PathLike) -> str:
    """A name on the Hub; of a folder its last part or its repository in the cache, as paths mean nothing to others."""
    path = Path(source)
    cached = next((part for part in path.parts if part.startswith(CACHED_FOLDERS)), None)
    if cached is not None:
        return cached.partition("--")[2].replace("--", "/")
    is_path = path.exists() or path.is_absolute() or len(path.parts) > 2 or ".." in path.parts
    return path.resolve().name if is_path else str(source)


def named_licence(license: str | None, license_name: str | None, license_link: str | None) -> str | Licence | None:
    """A licence as a command line tells it, in three flags; `None` leaves it to the base model's card."""
    if license is None and (license_name or license_link):
        raise ValueError(
            f"`license` must be given with `license_name` {license_name!r} and `license_link` "
            f'{license_link!r}, got None. Give "other" for a licence that the Hub does not list.'
        )
    return Licence(license, license_name, license_link) if license_name or license_link else license


def find_licence(
    base: str | os.PathLike, licence: str | Licence | None = None, *, token: str | None = None
) -> Licence:
    """The licence of what is derived from a base model: the one given, else that of the base model's card.

    `ValueError` where neither names one; `token` is to read the card of a private or gated model.
    """
    if isinstance(licence, Licence):
        return licence
    if licence is not None:
        return Licence(licence)
    path = Path(base, _CARD_NAME) if Path(base).is_dir() else None
    if path is None or not path.is_file():
        name = public_name(base)
        path = find_on_hub(name, _CARD_NAME, token) if "/" in name else None
    data = (metadata_load(path) if path is not None else None) or {}
    name, label, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(name, str) or (name == "other" and not label):
        raise ValueError(
            f"`license` must be given, got None, and the card of the base model {base} names none. "
            'Look it up there and pass its name on the Hub, such as "apache-2.0".'
        )
    if link and "://" not in link:  # a file of the base model
        name_on_hub = public_name(base)
        link = f"{constants.ENDPOINT}/{name_on_hub}/blob/main/{link}" if "/" in name_on_hub else None
    return Licence(name, label, link)


def find_on_hub(repo_id: str, name: str, token: str | None) -> Path | None:
    """A file of a repository; `None` where there is no such repository or no such file in it."""
    try:
        return Path(hf_hub_download(repo_id, name, token=token))
    except LocalEntryNotFoundError:
        raise
    except (HFValidationError, RepositoryNotFoundError, RemoteEntryNotFoundError):
        return None


_NULL_SPACE_PAPERS = ("dreambooth", "alphaedit", "inflora")
_NETWORKS = ("npnet", "golden_noise_model", "noise_sequence_transformer", "noise_sequence_rnn")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Parts of the names of pipelines that draw clips.
_DRAW_CLIPS = ("CogVideo", "LTX", "Video", "Wan")


@dataclass(frozen=True)
class Measured:
    """One measured figure.

    Args:
        dataset: what it was measured on, in words.
        metric: what was measured, in words.
        name: of the row, where one metric has several on one data set; the metric's by default.
        notes: seeds, interval and the like, for the table.
    """

    dataset: str
    metric: str
    value: float
    name: str | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        for field in ("dataset", "metric"):
            if not slug(getattr(self, field)):
                raise ValueError(f"`{field}` must hold a letter or a digit, got {getattr(self, field)!r}.")
        if isinstance(self.value, bool) or not hasattr(self.value, "__float__"):
            raise TypeError(f"`value` must be a number, got a {type(self.value).__name__}.")
        if not math.isfinite(self.value):
            raise ValueError(f"`value` must be finite, got {self.value} for {self.metric!r}.")


def slug(words: str) -> str:
    """Words as an identifier: lower case, runs of anything but letters and digits as one hyphen."""
    return re.sub(r"[\W_]+", "-", words.lower()).strip("-")


@dataclass(frozen=True)
class Kind:
    """What all cards of one kind share; its template is `templates/<kind>.jinja`.

    Attributes:
        tags: of the header.
        facts: what a card of this kind must be given besides what every card needs.
        papers: keys of entries in `papers.bib`.
        may_be_empty: those of `facts` that may be `None` or empty words.
        pipeline_tag: the Hub's task where the pipeline draws pictures (`task`); `None` for what is no model.
        library_name: the library whose loaders read it.
        relation: to the base model; `None` where the Hub knows none.
    """

    tags: tuple[str, ...]
    facts: tuple[str, ...]
    papers: tuple[str, ...]
    may_be_empty: tuple[str, ...] = ()
    pipeline_tag: str | None = "text-to-image"
    library_name: str | None = "diffusers"
    relation: str | None = "adapter"
    repo_type: Literal["model", "dataset"] = "model"

    def task(self, facts: Mapping[str, Any]) -> str | None:
        """The Hub's task of an artifact with these facts, by what its pipeline draws."""
        if self.pipeline_tag is None or "pipeline" not in facts:
            return self.pipeline_tag
        return "text-to-video" if draws_clips(facts) else "text-to-image"


def draws_clips(facts: Mapping[str, Any]) -> bool:
    """Whether the pipeline among the facts of a card is one of clips, not of pictures."""
    return any(part in (facts.get("pipeline") or "") for part in _DRAW_CLIPS)


KINDS: dict[str, Kind] = {
    "null_space_lora": Kind(
        tags=("diffusers", "diffusers-training", "lora", "dreambooth", "template:sd-lora"),
        facts=("instance_prompt", "pipeline", "directions", "rank", "statistics", "kohya_file"),
        papers=_NULL_SPACE_PAPERS,
        may_be_empty=("kohya_file",),
    ),
    "knowledge_edit": Kind(
        tags=("diffusers", "lora", "template:sd-lora", "knowledge-editing"),
        facts=("targets", "anchors", "pipeline", "rank", "kohya_file"),
        papers=("alphaedit", "uce"),
        may_be_empty=("kohya_file",),
    ),
    "subject_pipeline": Kind(
        tags=("diffusers", "diffusers-training", "dreambooth", "null-space-dreambooth"),
        facts=("instance_prompt", "pipeline", "statistics"),
        papers=_NULL_SPACE_PAPERS,
        may_be_empty=("instance_prompt",),
        relation="finetune",
    ),
    "feature_statistics": Kind(
        tags=("diffusers", "feature-statistics", "null-space-dreambooth"),
        facts=("pipeline", "num_prompts", "example_prompts", "layers", "megabytes"),
        papers=_NULL_SPACE_PAPERS,
        pipeline_tag=None,
    ),
    **{
        network: Kind(
            tags=("diffusers", "diffusers-training", "golden-noise", network.replace("_", "-")),
            facts=("network", "pipeline", "parameters", "latent_shape", "any_size", "text_embed_dim"),
            papers=("golden_noise",),
        )
        for network in _NETWORKS
    },
    "golden_noise_pipeline": Kind(
        tags=("diffusers", "golden-noise"),
        facts=("pipeline", "plain_pipeline", "network", "parameters"),
        papers=("golden_noise",),
        may_be_empty=("network",),
    ),
    "eraser": Kind(
        tags=("diffusers", "diffusers-training", "peft", "concept-erasure", "eraser"),
        facts=("concept", "anchor_concept", "preserved_concepts", "pipeline", "rank", "parameters"),
        papers=("t2vunlearning", "receler"),
        may_be_empty=("anchor_concept",),
        pipeline_tag="text-to-video",
    ),
    "pair_data_set": Kind(
        tags=("diffusers", "golden-noise"),
        facts=("num_pairs", "num_rejected", "num_steps", "latent_shape", "pipeline", "reward"),
        papers=("golden_noise",),
        may_be_empty=("reward",),
        pipeline_tag=None,
        library_name=None,
        relation=None,
        repo_type="dataset",
    ),
}


def check_common(
    repo_id: str,
    texts: Mapping[str, str],
    licence: Licence,
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
) -> None:
    """Raise unless the facts of every card say something and are what they should."""
    if not isinstance(repo_id, str) or not HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}.")
    if not isinstance(licence, Licence):
        raise TypeError(f"`licence` must be a Licence, got a {type(licence).__name__}.")
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` must say something in a card, got {value!r}.")
    for name, value in settings.items():
        if not isinstance(value, (str, Real)):
            raise TypeError(f"`settings` must hold numbers and words, got a {type(value).__name__} for {name!r}.")
    for result in results:
        if not isinstance(result, Measured):
            raise TypeError(f"`results` must hold Measured, got a {type(result).__name__}.")
    for pair in widget:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`widget` must hold pairs of prompt and file, got {pair!r}.")
        check_file_name(pair[1], "widget")


def check_facts(kind: str, found: Kind, facts: Mapping[str, Any]) -> None:
    """Raise unless a kind's own facts are all there, say something and are of their type."""
    for name in found.facts:
        if name not in facts:
            raise ValueError(f"`{name}` must be given for a card of kind {kind!r}, got only {sorted(facts)}.")
        if facts[name] is None or facts[name] == "":
            if name not in found.may_be_empty:
                raise ValueError(f"`{name}` must say something in a card, got {facts[name]!r}.")
        else:
            check_fact(name, facts[name])
    unknown = sorted(facts.keys() - set(found.facts))
    if unknown:
        raise ValueError(f"A card of kind {kind!r} must have no facts but {list(found.facts)}, got {unknown}.")


def bibtex(papers: Sequence[str], version: str) -> str:
    """Entries of `templates/papers.bib`, then the one for this package."""
    text = Path(__file__).with_name("templates").joinpath("papers.bib").read_text(encoding="utf-8")
    entries = {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in text.strip().split("\n\n")}
    entries["diffusers_ext"] = entries["diffusers_ext"].replace("VERSION", version)
    return "\n\n".join(entries[key] for key in (*papers, "diffusers_ext"))

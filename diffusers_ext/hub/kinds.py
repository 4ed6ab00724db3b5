"""The kinds of artifacts that have a card, what each card must be told, and whom it cites."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from diffusers_ext.hub.licence import Licence
from diffusers_ext.hub.safe_markdown import check_file_name

_NULL_SPACE_PAPERS = ("dreambooth", "alphaedit", "inflora")
_NETWORKS = ("npnet", "golden_noise_model", "noise_sequence_transformer", "noise_sequence_rnn")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_DIRECTIONS = ("generalized", "null", "soft", "plain")
# Names of classes, which end up in import statements.
_CLASSES = ("pipeline", "plain_pipeline", "network")
# All others are words.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    name: known
    for names, known in (
        ("rank parameters layers text_embed_dim num_prompts", (Integral, "a whole number")),
        ("num_pairs num_rejected num_steps", (Integral, "a whole number")),
        ("megabytes", (Real, "a number")),
        ("statistics any_size", (bool, "True or False")),
        ("example_prompts preserved_concepts latent_shape", ((list, tuple), "a list")),
    )
    for name in names.split()
}
# key -> (authors, title, year, arXiv number)
PAPERS: dict[str, tuple[str, str, int, str]] = {
    "dreambooth": (
        "Ruiz, Nataniel and Li, Yuanzhen and Jampani, Varun and Pritch, Yael and Rubinstein, "
        "Michael and Aberman, Kfir",
        "{DreamBooth}: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
        2022,
        "2208.12242",
    ),
    "alphaedit": (
        "Fang, Junfeng and Jiang, Houcheng and Wang, Kun and Ma, Yunshan and Shi, Jie and "
        "Wang, Xiang and He, Xiangnan and Chua, Tat-Seng",
        "{AlphaEdit}: Null-Space Constrained Knowledge Editing for Language Models",
        2024,
        "2410.02355",
    ),
    "inflora": (
        "Liang, Yan-Shuo and Li, Wu-Jun",
        "{InfLoRA}: Interference-Free Low-Rank Adaptation for Continual Learning",
        2024,
        "2404.00228",
    ),
    "golden_noise": (
        "Zhou, Zikai and Shao, Shitong and Bai, Lichen and Zhang, Shufei and Xu, Zhiqiang and Han, Bo and Xie, Zeke",
        "Golden Noise for Diffusion Models: A Learning Framework",
        2024,
        "2411.09502",
    ),
    "t2vunlearning": (
        "Ye, Xiaoyu and Cheng, Songjie and Wang, Yongtao and Xiong, Yajiao and Li, Yishen",
        "{T2VUnlearning}: A Concept Erasing Method for Text-to-Video Diffusion Models",
        2025,
        "2505.17550",
    ),
    "receler": (
        "Huang, Chi-Pin and Chang, Kai-Po and Tsai, Chung-Ting and Lai, Yung-Hsuan and "
        "Yang, Fu-En and Wang, Yu-Chiang Frank",
        "{Receler}: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight Erasers",
        2023,
        "2311.17717",
    ),
}


@dataclass(frozen=True)
class Measured:
    """One measured figure.

    Args:
        dataset: what it was measured on, in words.
        metric: what was measured, in words.
        value: the figure.
        name: of the row, where one metric has several on one data set; the metric's by default.
        notes: seeds, interval and the like, for the table.

    Raises:
        ValueError: a data set or metric without letters, or a value that is not finite.
        TypeError: a value that is no number.
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
        papers: keys of `PAPERS`.
        may_be_empty: those of `facts` that may be `None` or empty words.
        pipeline_tag: the Hub's task; `None` for what is no model.
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


KINDS: dict[str, Kind] = {
    "null_space_lora": Kind(
        tags=("diffusers", "diffusers-training", "lora", "dreambooth", "template:sd-lora"),
        facts=("instance_prompt", "pipeline", "directions", "rank", "statistics", "kohya_file"),
        papers=_NULL_SPACE_PAPERS,
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
            facts=(
                "network", "pipeline", "parameters", "latent_shape", "any_size", "text_embed_dim",
            ),
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
        tags=("diffusers", "diffusers-training", "peft", "concept-erasure", "eraser", "cogvideox"),
        facts=(
            "concept", "anchor_concept", "preserved_concepts", "pipeline", "rank", "parameters",
        ),
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
}  # fmt: skip


def check_common(repo_id: str, base: str, licence: Licence, trained_on: str, version: str) -> None:
    """Raise unless these facts of every card say something."""
    if not isinstance(repo_id, str) or not HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"`repo_id` must be 'user/name', got {repo_id!r}.")
    if not isinstance(licence, Licence):
        raise TypeError(f"`licence` must be a Licence, got a {type(licence).__name__}.")
    for name, value in (("base", base), ("trained_on", trained_on), ("version", version)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` must say something in a card, got {value!r}.")


def check_lists(
    settings: Mapping[str, object], results: Sequence[Measured], widget: Sequence[tuple[str, str]]
) -> None:
    """Raise unless settings are words and numbers, and results and pictures are what they should."""
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
            _check_value(name, facts[name])
    unknown = sorted(facts.keys() - set(found.facts))
    if unknown:
        raise ValueError(f"A card of kind {kind!r} must have no facts but {list(found.facts)}, got {unknown}.")


def _check_value(name: str, value: Any) -> None:
    wanted, words = _TYPES.get(name, (str, "words"))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"`{name}` must be {words}, got a {type(value).__name__}.")
    if name in _CLASSES and not value.isidentifier():
        raise ValueError(f"`{name}` must be the name of a class, got {value!r}.")
    for item in value if isinstance(value, (list, tuple)) else ():
        kind, words = (Integral, "whole numbers") if name == "latent_shape" else (str, "words")
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"`{name}` must hold {words}, got a {type(item).__name__}: {item!r}.")
    if name == "directions" and value not in _DIRECTIONS:
        raise ValueError(f"`directions` must be one of {_DIRECTIONS}, got {value!r}.")


def bibtex(papers: tuple[str, ...], version: str) -> str:
    """Entries for some keys of `PAPERS`, then one for this package."""
    entries = []
    for key in papers:
        authors, title, year, number = PAPERS[key]
        wrapped = "\n    ".join(textwrap.wrap(authors, 80))
        entries.append(
            f"@article{{{key},\n  author = {{{wrapped}}},\n  title = {{{title}}},\n"
            f"  journal = {{arXiv:{number}}},\n  year = {{{year}}}\n}}"
        )
    entries.append(
        "@software{diffusers_ext,\n"
        "  title = {diffusers\\_ext: null-space DreamBooth, golden noise and a concept eraser for "
        f"diffusers}},\n  version = {{{version}}}\n}}"
    )
    return "\n\n".join(entries)

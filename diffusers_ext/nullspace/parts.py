"""Statistics in parts: written by independent jobs, each of its share of the batches, and put together again."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.artifacts import same_fingerprint
from diffusers_ext.core.sources import CONFIG_NAME
from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.statistics import PART_CLASS, FeatureStatistics
from diffusers_ext.nullspace.stored_moments import check_config, restore_moments

_PART = "part"
_RULE = "an index and a count as in 0/4, from 0/4 to 3/4 for four jobs"


def read_shard(text: str) -> tuple[int, int]:
    """`(index, count)` of `"index/count"`; raises `ValueError` for what is none."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"`shard` must be {_RULE}, got {text!r}.")
    return int(found[1]), int(found[2])


class FeatureStatisticsPart(FeatureStatistics):
    """The share of one job in the statistics of all prompts, `facts["part"]` its index and their count.

    On disk it is a class of its own: what the prompts of one part leave free, the others may use, so that nothing may
    take a part for the statistics.
    """

    @classmethod
    def of(cls, statistics: FeatureStatistics, shard: tuple[int, int]) -> FeatureStatisticsPart:
        """What `collect_statistics(..., shard=shard)` gave, to be saved."""
        return cls(statistics.moments, statistics.sources, {**statistics.facts, _PART: list(shard)})

    @property
    def shard(self) -> tuple[int, int]:
        """`(index, count)` of this part."""
        return tuple(self.facts[_PART])

    @classmethod
    def _from_artifact(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FeatureStatisticsPart:
        check_config(config)
        _check_part(config["facts"])
        # A job with fewer batches than others has seen nothing of some.
        return cls(restore_moments(config["moments"], tensors, least=0), config["sources"], config["facts"])


def _check_part(facts: dict[str, Any]) -> None:
    shard = facts.get(_PART)
    numbers = isinstance(shard, list) and len(shard) == 2 and all(type(value) is int for value in shard)
    if not numbers or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`facts.part` must be an index below a count, got {shard!r:.80}.")


def merge_parts(folders: Sequence[str | os.PathLike]) -> FeatureStatistics:
    """The statistics of one process from the parts of all jobs, in any order; one is in memory at a time.

    Equal to it up to the rounding of a float64 addition for each part.

    Raises:
        ValueError: a folder without a part, a part that is missing or there twice, of another number of parts, or
            collected on another model, of other prompts or with other settings.
    """
    if not folders:
        raise ValueError("`parts` must name the folders of all parts, got none.")
    facts = {Path(folder): _facts_of(Path(folder)) for folder in folders}
    if len(facts) < len(folders):
        raise ValueError(f"`parts` must name every folder once, got {[str(folder) for folder in folders]}.")
    order = _in_order(facts)
    first = order[0]
    for other in order[1:]:
        _check_same(first, facts[first], other, facts[other])
    whole = FeatureStatisticsPart.from_pretrained(first)
    for folder in order[1:]:
        part = FeatureStatisticsPart.from_pretrained(folder)
        if part.sources != whole.sources:
            raise ValueError(f"`parts` must cover the same Linears, got others in {folder} than in {first}.")
        for key, moment in whole.moments.items():
            moment.merge(part.moments[key])
    unseen = sorted(key for key, moment in whole.moments.items() if not moment.count)
    if unseen:
        raise ValueError(f"`parts` must have read vectors for every matrix, got none for {unseen[:3]}.")
    told = {name: value for name, value in whole.facts.items() if name != _PART}
    return FeatureStatistics(whole.moments, whole.sources, told)


def _facts_of(folder: Path) -> dict[str, Any]:
    """The facts of a part, from its config alone."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"`parts` must be folders that `diffusers-ext collect --shard` wrote, got {folder}.")
    config = read_json(path)
    if config.get("_class_name") != PART_CLASS:
        raise ValueError(
            f"`parts` must be folders that `diffusers-ext collect --shard` wrote, got {folder} with a "
            f"{config.get('_class_name')!r}."
        )
    facts = copy.deepcopy(config.get("facts"))
    if not isinstance(facts, dict):
        raise ValueError(f"`facts` must be an object, got {facts!r:.80} in {path}.")
    _check_part(facts)
    return facts


def _in_order(facts: dict[Path, dict[str, Any]]) -> list[Path]:
    """The folders by the index of their parts, of which all must be there once."""
    counts = {folder: found[_PART][1] for folder, found in facts.items()}
    count = next(iter(counts.values()))
    for folder, found in counts.items():
        if found != count:
            raise ValueError(f"`parts` must be of one number of parts, got {count} and, in {folder}, {found}.")
    by_index: dict[int, Path] = {}
    for folder, found in facts.items():
        index = found[_PART][0]
        if index in by_index:
            raise ValueError(f"`parts` must hold part {index}/{count} once, got it in {by_index[index]} and {folder}.")
        by_index[index] = folder
    missing = [f"{index}/{count}" for index in range(count) if index not in by_index]
    if missing:
        raise ValueError(
            f"`parts` must be all {count} parts, got none for {', '.join(missing[:8])}. Run `diffusers-ext collect "
            f"--shard {missing[0]}` with the flags of the others."
        )
    return [by_index[index] for index in sorted(by_index)]


def _check_same(first: Path, facts: dict[str, Any], other: Path, others: dict[str, Any]) -> None:
    """Raise `ValueError` where two parts are not of one collection; a model's place may differ, not its weights."""
    models, their_models = facts.get("models", {}), others.get("models", {})
    for name in sorted(models.keys() | their_models.keys()):
        if name not in models or name not in their_models or not same_fingerprint(models[name], their_models[name]):
            raise ValueError(f"`parts` must be of one model, got another {name} in {other} than in {first}.")
    for name in sorted((facts.keys() | others.keys()) - {_PART, "models", "base_model"}):
        if facts.get(name) != others.get(name):
            raise ValueError(
                f"`parts` must be of one collection, got other {name} in {other} than in {first}"
                f"{_difference(facts.get(name), others.get(name))}."
            )


def _difference(ours: Any, theirs: Any) -> str:
    """The first thing in which two facts differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f": {name} is {theirs.get(name)!r:.80}, not {ours.get(name)!r:.80}"
    if isinstance(ours, list) and isinstance(theirs, list):
        different = [text for text in theirs if text not in ours] or [text for text in ours if text not in theirs]
        return f", {different[0]!r:.80} is in one of them" if different else ", their order differs"
    return ""

"""Share what a folder or file holds, whichever of this project's artifacts it is."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.sources import LORA_WEIGHT_NAME, refuse_checkpoint
from diffusers_ext.core.tensor_files import open_tensors
from diffusers_ext.core.text_files import read_json
from diffusers_ext.eraser.files import eraser_card, facts_of_config
from diffusers_ext.eraser.formats import FILE_NAMES, FORMATS, read_eraser
from diffusers_ext.evaluation.erasure_report import ErasureReport
from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.families import FAMILIES
from diffusers_ext.golden_noise.card import GOLDEN_PIPELINES, network_card
from diffusers_ext.golden_noise.networks.base import NETWORK_MODULES, load_noise_model
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.pairs.shards import CLASS_NAME as PAIRS
from diffusers_ext.hub import Measured
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.push import path_inside, push_folder, split_arguments
from diffusers_ext.nullspace.edit import REPORT_NAME as EDIT_REPORT_NAME
from diffusers_ext.nullspace.edit import push_edit
from diffusers_ext.nullspace.lora_upload import measured_drift, push_lora
from diffusers_ext.nullspace.statistics import FeatureStatistics

REPORT_NAME = "training_report.json"
# What a report may say; where, under whose name and for whom is said by who uploads alone.
_FACTS = (
    "base_model", "license", "trained_on", "settings", "widget", "instance_prompt", "pipeline",
    "directions", "concept", "anchor_concept", "preserved_concepts", "reward",
)  # fmt: skip
_INDEX = "model_index.json"
_NULL_SPACE = {f.nullspace_pipeline: f.pipelines[0] for f in FAMILIES if f.nullspace_pipeline}


def push_artifact(
    source: str | os.PathLike,
    repo_id: str,
    *,
    results: str | os.PathLike | Sequence[Measured] | None = None,
    **arguments: Any,
) -> str:
    """Recognise an artifact, and upload its files with its model card; returns the address of the commit.

    Facts for the card come from the arguments, then from the files and the `training_report.json` beside them. A
    `ValueError` (nothing known is there, the files are damaged or lead elsewhere, a fact is missing) comes before the
    upload.

    Args:
        source: a folder as the training scripts and `save_pretrained` write it, or a LoRA's file.
        repo_id: `"user/name"`, made when absent.
        results: what was measured, or the report of an evaluation script: its folder or JSON file.
        arguments: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`; and facts for the card:
            `base_model`, `license`, `trained_on`, `settings`, `widget` and those of the kind.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"`source` must be a folder or a file, got {source}: there is none.")
    refuse_checkpoint(source)
    push = _recognise(source)
    folder = source if source.is_dir() else source.parent
    hub, given = split_arguments(arguments)
    if isinstance(results, (str, os.PathLike)):
        results = measured_results(results)
    facts = reported_facts(folder)
    if results is not None:
        facts["results"] = [*facts.get("results", ()), *results]
    return push(source, repo_id, {**facts, **given}, hub)


def _recognise(source: Path) -> Callable[..., str]:
    """What pushes the artifact."""
    if source.is_file() and source.suffix == ".safetensors":
        return _push_lora
    for names, push in (
        ([EDIT_REPORT_NAME], _push_edit),
        ([LORA_WEIGHT_NAME], _push_lora),
        ([names[0] for names in FORMATS.values()], _push_eraser),
        ([_INDEX, f"pipeline/{_INDEX}"], _push_pipeline),
    ):
        if any((source / name).is_file() for name in names):
            return push
    found = _read_json(source / CONFIG_NAME).get("_class_name")
    known = {PAIRS: _push_pairs, FeatureStatistics.__name__: _push_statistics}
    known |= dict.fromkeys(NETWORK_MODULES, _push_network)
    if found not in known:
        inside = f"{sorted(path.name for path in source.iterdir())} in" if source.is_dir() else "only"
        raise ValueError(
            f"`source` must hold a LoRA, an eraser, a pipeline or one of {sorted(known)}, got {inside} {source}. Give "
            "the folder that `save_pretrained` or a training script wrote, or the `.safetensors` file of a LoRA."
        )
    return known[found]


def _push_lora(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    folder = source if source.is_dir() else source.parent
    if source.is_dir():
        path_inside(source, LORA_WEIGHT_NAME)
    if "statistics" not in facts and (folder / "statistics" / CONFIG_NAME).is_file():
        facts["statistics"] = _own_statistics(folder)
    facts["widget"] = [(prompt, folder / file) for prompt, file in facts.get("widget", ())]
    return push_lora(source, repo_id, **facts, **hub)


def _push_edit(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    return push_edit(source, repo_id, **facts, **hub)


def _push_eraser(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    eraser = read_eraser(source)
    facts = {**facts_of_config(eraser.config), **facts}
    card = eraser_card(eraser.tensors, token=hub.get("token"), **facts)
    return _push_files(source, repo_id, card, FILE_NAMES, facts, hub, delete_patterns=FILE_NAMES)


def _push_statistics(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    return _own_statistics(source, "").push_to_hub(repo_id, **facts, **hub)


def _push_pairs(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    return open_pairs(source).push_to_hub(repo_id, **facts, **hub)


def _push_network(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    card = network_card(load_noise_model(source), token=hub.get("token"), **facts)
    return _push_files(source, repo_id, card, [CONFIG_NAME, "diffusion_pytorch_model*"], facts, hub)


def _push_pipeline(source: Path, repo_id: str, facts: dict[str, Any], hub: dict[str, Any]) -> str:
    at_root = None if (source / _INDEX).is_file() else "pipeline"
    folder = source / (at_root or "")
    index = _read_json(folder / _INDEX)
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    name = index.get("_class_name")
    if name in GOLDEN_PIPELINES.values():
        kind, own = "golden_noise_pipeline", _golden_facts(folder, index)
    else:
        if name not in {*_NULL_SPACE, *_NULL_SPACE.values()}:
            raise ValueError(
                f"`source` must hold a pipeline of {sorted(_NULL_SPACE)}, of their plain classes or of "
                f"{sorted(GOLDEN_PIPELINES.values())}, got a {name} in {folder}."
            )
        kind, own = "subject_pipeline", {"pipeline": _NULL_SPACE.get(name, name)}
        own["statistics"] = (source / "statistics" / CONFIG_NAME).is_file()
        own["instance_prompt"] = None
    needed = {"base_model": None, "license": None, "trained_on": None, **own}
    card = make_card(kind, token=hub.get("token"), **{**needed, **facts})
    prefix = f"{at_root}/" if at_root else ""
    patterns = [f"{prefix}{_INDEX}", *(f"{prefix}{part}/*" for part in parts), "statistics/*"]
    return _push_files(source, repo_id, card, patterns, facts, hub, at_root=at_root)


def _golden_facts(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    name, network = index["_class_name"], index.get("noise_model", [None, None])[1]
    plain = next(plain for plain, golden in GOLDEN_PIPELINES.items() if golden == name)
    files = [open_tensors(path) for path in (folder / "noise_model").glob("*.safetensors")]
    shapes = [file.get_slice(key).get_shape() for file in files for key in file.keys()]
    return {
        "pipeline": name, "plain_pipeline": plain, "network": network or "",
        "parameters": sum(map(math.prod, shapes)),
    }  # fmt: skip


def _push_files(
    folder: Path,
    repo_id: str,
    card: Callable[..., Card],
    patterns: Sequence[str],
    facts: Mapping[str, Any],
    hub: dict[str, Any],
    **folder_arguments: Any,
) -> str:
    """Upload the files of some patterns, those that the card shows, and the training's report."""
    shown = [file for _, file in facts.get("widget", ())]
    patterns = [*patterns, *map(glob.escape, shown), REPORT_NAME]
    kept = {path for pattern in patterns for path in folder.glob(pattern)}
    kept |= {path for found in list(kept) if found.is_dir() for path in found.rglob("*")}
    others = [path for path in folder.rglob("*") if path.is_file() and path not in kept]
    ignored = [glob.escape(path.relative_to(folder).as_posix()) for path in others]
    return push_folder(folder, repo_id, card, ignore_patterns=ignored, **folder_arguments, **hub)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def measured_results(path: str | os.PathLike) -> list[Measured]:
    """The figures of the report of an evaluation: its JSON file, or the folder with its `report.json`."""
    path = Path(path, "report.json") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"`results` must be the report of an evaluation, got {path}: no such file.")
    content = read_json(path)
    for report in (ForgettingReport, GoldenNoiseReport, ErasureReport):
        if set(content) == set(report.saved):
            return list(report(**content).measured())
    raise ValueError(
        f"{path} must be the report of an evaluation, got {sorted(content)}. The scripts "
        "`training/evaluate_*.py` write one."
    )


def reported_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """Facts for the card that a training left beside its result; none where there is no report.

    A report is a stranger's words, which count as far as they are about the artifact: `private` or `token`, or files
    outside of the folder, are a `ValueError`.
    """
    path = Path(folder, REPORT_NAME)
    if not path.is_file():
        return {}
    report = read_json(path_inside(folder, REPORT_NAME))
    facts = _checked_facts(report.get("card", {}), path)
    drifts = report.get("predicted_drift")
    if drifts:
        values = list(drifts.values()) if isinstance(drifts, dict) else [drifts]
        if not all(type(value) in (int, float) for value in values):
            raise ValueError(f"`predicted_drift` of {path} must be numbers, got {drifts!r:.80}.")
        facts["results"] = measured_drift(drifts, _own_statistics(folder))
    return facts


def _own_statistics(folder: str | os.PathLike, subfolder: str = "statistics") -> FeatureStatistics:
    """The statistics in a folder, if its files are not links to elsewhere."""
    for name in (CONFIG_NAME, FeatureStatistics.weights_name):
        path_inside(folder, Path(subfolder, name))
    return FeatureStatistics.from_pretrained(Path(folder, subfolder))


def _checked_facts(card: Any, path: Path) -> dict[str, Any]:
    if not isinstance(card, dict):
        raise ValueError(f"`card` of {path} must be an object, got {type(card).__name__}.")
    for name, value in card.items():
        if name not in _FACTS:
            raise ValueError(
                f"`card` of {path} must hold facts about the result, got {name!r}, which is none of "
                f"{list(_FACTS)}. Give what concerns the upload itself in the call."
            )
        items = value if isinstance(value, list) else [value]
        named = isinstance(value, dict)
        nested = any(isinstance(x, (dict, list)) for x in (value.values() if named else items))
        if name != "widget" and (nested or named != (name == "settings")):
            raise ValueError(f"`card.{name}` of {path} must be words or numbers, got {value!r:.80}.")
    if "widget" not in card:
        return dict(card)
    for pair in card["widget"] if isinstance(card["widget"], list) else [None]:
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, str]:
            raise ValueError(f"`card.widget` of {path} must hold pairs of prompt and file, got {pair!r:.80}.")
        path_inside(path.parent, pair[1])
    return {**card, "widget": [(prompt, file) for prompt, file in card["widget"]]}

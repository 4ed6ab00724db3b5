"""Edit what a model knows in closed form (`edit_equations`): no training, an ordinary LoRA in seconds."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.concept_words import contains_concept
from diffusers_ext.core.lora_formats import check_lora_effect
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.core.text_files import read_json
from diffusers_ext.families import match_family
from diffusers_ext.families.lora_files import COMFYUI_NAME, KOHYA_NAME, export_lora, read_lora, second_file
from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.push import path_inside, push_folder, split_arguments
from diffusers_ext.nullspace.edit_equations import (
    edit_factors,
    effect_moments,
    in_places,
    layer_report,
    preserved_moment,
    read_weight,
    target_rows,
)
from diffusers_ext.nullspace.edit_prompts import (
    ConceptEdit,
    carried_along,
    check_read_apart,
    replaced,
    split_prompts,
    stand_ins,
)
from diffusers_ext.nullspace.edit_report import EditForecast, EditReport, edit_warnings
from diffusers_ext.nullspace.statistics import TEXT
from diffusers_ext.nullspace.text_only import TextReader, lora_name, text_only_linears, text_readers

logger = logging.getLogger(__name__)
StateDict = dict[str, torch.Tensor]
REPORT_NAME = "edit_report.json"
# Of the median distance of concepts; the nearest of digits and colours lie at a third of it and more.
_ONE_CONCEPT = 0.25


@dataclass(frozen=True)
class EditedConcepts:
    """The result of `edit_concept`: a LoRA of scale 1, keys as in `read_lora`, and its report.

    Attributes:
        facts: `pipeline`, its class; `settings`, how it was solved for; `preserve`, the prompts to keep.
    """

    lora: StateDict
    report: EditReport
    edits: tuple[ConceptEdit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, str]:
        """What is edited, in words: target to anchor."""
        return {edit.target: edit.told for edit in self.edits}

    def save(self, output_dir: str | os.PathLike, *, base_model: str = "") -> Path:
        """Write the LoRA for diffusers, again where ComfyUI and A1111 know other names, and the report.

        Returns:
            The folder with `pytorch_lora_weights.safetensors`, `edit_report.json`, and of a UNet
            `comfyui_a1111_kohya.safetensors`, of some transformers (Wan, LTX-2) `comfyui.safetensors`.
        """
        folder = Path(output_dir)
        title = ", ".join(f"{target} -> {anchor or 'nothing'}" for target, anchor in self.told.items())
        metadata = {"modelspec.title": title, **({"ss_sd_model_name": base_model} if base_model else {})}
        export_lora(self.lora, "diffusers", folder / LORA_WEIGHT_NAME, metadata=metadata)
        pipeline = self.facts.get("pipeline")
        if other := second_file(self.lora, pipeline and match_family(pipeline)):
            export_lora(self.lora, "comfyui", folder / other, metadata=metadata, pipeline=pipeline)
        report = {"edits": self.told, **dataclasses.asdict(self.report), **self.facts, "base_model": base_model}
        write_atomically(folder / REPORT_NAME, json.dumps(report, indent=2) + "\n")
        return folder

    def push_to_hub(self, repo_id: str, *, base_model: str, **arguments: Any) -> str:
        """Upload what `save` writes with a model card, as `push_edit` does; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            return push_edit(self.save(folder, base_model=base_model), repo_id, **arguments)


def read_edit(folder: str | os.PathLike) -> tuple[list[ConceptEdit], list[str], dict[str, Any]]:
    """The edits of a folder that `EditedConcepts.save` wrote, the prompts that they keep, and the whole report."""
    path = Path(folder, REPORT_NAME)
    if not path.is_file():
        raise ValueError(f"`edit` must be a folder with {REPORT_NAME}, got {folder} without it.")
    report = read_json(path)
    missing = sorted({"concepts", "preserve", "pipeline", "settings"} - report.keys())
    if missing:
        raise ValueError(f"{path} must tell {missing}, got a report without. Make the edit anew.")
    return [ConceptEdit(row["target"], row["weights"]) for row in report["concepts"]], report["preserve"], report


def edit_card(
    folder: str | os.PathLike,
    *,
    base_model: str | None = None,
    license: str | Licence | None = None,
    trained_on: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str]] = (),
    token: str | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """The card of an edit in a folder, but for the name of its repository; arguments as of `push_edit`."""
    edits, preserve, report = read_edit(folder)
    lora = read_lora(folder)
    check_lora_effect(lora)
    drift = max(row["drift"] for row in report["layers"])
    told = [Measured(f"{len(preserve)} preserved prompts", "predicted drift of a layer's outputs, the worst", drift)]
    for row in report["concepts"]:
        name = f"share of the edit of {row['target']!r} that is achieved"
        told.append(Measured(f"{row['prompts']} edited prompts", "share achieved", row["achieved"], name=name))
    return make_card(
        "knowledge_edit",
        base_model=base_model or report.get("base_model") or None,
        license=license,
        trained_on=trained_on
        or f"Nothing was trained: solved for in {report['seconds']:.1f} s from the weights and "
        f"what they read for {report['edited_prompts']} prompts to edit and {report['preserved_prompts']} to keep.",
        settings=settings or report["settings"],
        results=[*told, *results],
        widget=widget,
        token=token,
        targets=[edit.target for edit in edits],
        anchors=[edit.told for edit in edits],
        rank=max(row["rank"] for row in report["layers"]),
        kohya_file=second_file(lora, match_family(report["pipeline"])),
        **{"pipeline": report["pipeline"], **facts},
    )


def push_edit(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | Licence | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str | os.PathLike]] = (),
    **arguments: Any,
) -> str:
    """Upload the LoRA and the report that `EditedConcepts.save` wrote, with a model card.

    Args:
        folder: with `edit_report.json`.
        base_model: Hub name, where the report does not name it.
        license: as of the base model when `None`.
        results: what was measured, besides what the report predicts, such as by `evaluate_edit`.
        widget: (prompt, local picture) to show; uploaded to `pictures/`.
        arguments: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`; and `trained_on`,
            `settings`.

    Returns:
        Address of the commit, or of the pull request. Nothing is uploaded where a fact is missing.
    """
    hub, facts = split_arguments(arguments)
    shown = [(prompt, f"pictures/{index}{Path(path).suffix}") for index, (prompt, path) in enumerate(widget)]
    facts |= {"base_model": base_model, "license": license, "results": results, "widget": shown}
    card = edit_card(folder, token=hub.get("token"), **facts)
    with tempfile.TemporaryDirectory() as upload:
        for name in (LORA_WEIGHT_NAME, KOHYA_NAME, COMFYUI_NAME, REPORT_NAME):
            if Path(folder, name).is_file():
                shutil.copyfile(path_inside(folder, name), Path(upload, name))
        for (_, path), (_, name) in zip(widget, shown):
            Path(upload, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, Path(upload, name))
        return push_folder(upload, repo_id, card, **hub)


@torch.no_grad()
def edit_concept(
    pipeline: DiffusionPipeline,
    edits: Mapping[str, str | Mapping[str, float] | None] | Sequence[ConceptEdit],
    preserve: Sequence[str],
    *,
    earlier: Mapping[str, str | Mapping[str, float]] | Sequence[ConceptEdit] = (),
    negative_prompt: str = "",
    preserve_weight: float = 1.0,
    eps: float = 1e-4,
    hard: bool = False,
    kept: float = 0.999,
    expand_sub_phrases: bool = True,
    batch_size: int = 64,
    **call_arguments: Any,
) -> EditedConcepts:
    """Let a model read an anchor where a prompt names a target, by a LoRA on the Linears that read text alone.

    All edits are solved for at once. Nothing is trained, and the pipeline is left as it was; load the result by
    `pipeline.load_lora_weights(result.lora)`, dial it by the adapter's weight.

    Args:
        pipeline: of any family whose denoiser has Linears that read text alone (`text_only_linears`).
        edits: `{target: anchor}`, or `ConceptEdit`s; an anchor of `None` is found (`nearest_anchor`).
        preserve: prompts to keep. The empty prompt and `negative_prompt` weigh as much as all of them, because
            guidance reads them in every picture. Those that name a target are edited (see `ConceptEdit`).
        earlier: edits that the model's weights hold already, as the `edits` of their results. Their targets are no
            anchors and stay as they are read by now, but for those read as a concept that is edited now: they follow.
            Drifts of `n` edits may add up to `n` times one's, so that the `n`-th keeps `n^2` times as strictly.
        preserve_weight, eps, hard: see `edit_factors`.
        kept: share of the update's effect on the targets that its rank keeps.
        expand_sub_phrases: also preserve every prompt with one word left out.
        batch_size: prompts read at once.
        call_arguments: for the pipeline's call, where its smallest one needs more than a size.

    Raises:
        ValueError: an edit or prompts as in `ConceptEdit`, `carried_along` and `split_prompts`; an anchor that the
            text encoder cannot tell from its target; a denoiser that carries a LoRA.
    """
    started = time.perf_counter()
    if not 0 < kept <= 1:
        raise ValueError(f"`kept` must be above 0 and at most 1, got {kept}.")
    edits = ConceptEdit.read(edits)
    earlier = list({edit.target: edit for edit in ConceptEdit.read(earlier)}.values())  # the last of each target
    if not edits:
        raise ValueError("`edits` must hold at least one target and its anchor, got none.")
    root = text_readers(pipeline)
    if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
        raise ValueError("`pipeline` must carry no LoRA while it is edited, got one. Fuse or unload it first.")
    sources = text_only_linears(pipeline, **call_arguments)
    reader = TextReader(pipeline, sources, batch_size, call_arguments)
    edits = with_anchors(reader, edits, preserve, expand_sub_phrases, earlier)
    prompts, preserved = split_prompts(edits, preserve, expand_sub_phrases, earlier)
    check_read_apart(pipeline, prompts, preserved)
    settings: dict[str, Any] = {"preserve_weight": preserve_weight, "eps": eps, "hard": hard}
    lora: StateDict = {}
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    rows: list[dict[str, Any]] = []
    kept_whole = set(preserved)
    forecast = EditForecast(reader, prompts, [prompt for prompt in preserve if prompt in kept_whole])
    for source in dict.fromkeys(sources.values()):
        targets, c2 = target_rows(root, reader, prompts, source, updates)
        c0 = preserved_moment(reader, preserved, negative_prompt, source)
        left, a, share = edit_factors(targets, c0 * (1 + len(earlier)) ** 2, kept=kept, edits=len(edits), **settings)
        missed, moved = effect_moments(left, a, targets, c2, c0)
        # What is only reported is computed at the weights' own precision: half of the time at SDXL's size.
        told = [moment.float() for moment in (missed, moved, c2, c0)]
        metric = torch.zeros_like(c0)
        for name in (name for name in sources if sources[name] == source):
            weight = read_weight(root.get_submodule(name))
            own = weight.float().T @ weight.float()
            metric += own
            b = weight @ left
            key = lora_name(pipeline, name)
            lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"] = a.float(), b.float()
            updates[name] = a, b
            rows.append({"linear": name, "source": source, "rank": len(a), "kept": share})
            rows[-1] |= layer_report(own, *told)
        forecast.add(source, left, a, metric)
    concepts = forecast.concepts()
    warnings = edit_warnings(concepts)
    for warning in warnings:
        logger.warning(warning)
    counts = (sum(len(edit.targets) for edit in prompts), len(preserved))
    report = EditReport(rows, concepts, forecast.most_moved, *counts, warnings, seconds=time.perf_counter() - started)
    settings |= {"kept": kept, "expand_sub_phrases": expand_sub_phrases, "negative_prompt": negative_prompt}
    facts = {"pipeline": type(pipeline).__name__, "preserve": list(preserve), "settings": settings}
    facts["earlier"] = {edit.target: edit.told for edit in earlier}
    return EditedConcepts(lora, report, tuple(found.edit for found in prompts), facts)


def with_anchors(
    reader: TextReader,
    edits: Sequence[ConceptEdit],
    preserve: Sequence[str],
    expand_sub_phrases: bool,
    earlier: Sequence[ConceptEdit] = (),
) -> list[ConceptEdit]:
    """Edits with the anchors found that are not given (`nearest_anchor`), and earlier ones that follow them."""
    targets = [edit.target for edit in (*edits, *earlier)]
    remaining = [prompt for prompt in preserve if not any(contains_concept(prompt, target) for target in targets)]
    chosen = []
    for edit, found in zip(edits, split_prompts(edits, preserve, expand_sub_phrases)[0]):
        if edit.anchor is None:
            anchor = nearest_anchor(reader, edit.target, found.targets, preserve, remaining)
            edit = dataclasses.replace(edit, anchor=anchor)
        chosen.append(edit)
    return [*chosen, *carried_along(chosen, earlier)]


def nearest_anchor(
    reader: TextReader, target: str, prompts: Sequence[str], preserve: Sequence[str], remaining: Sequence[str]
) -> str:
    """The concept of the preserved prompts that the model reads most like the target.

    It is the one of `stand_ins` among the remaining prompts, which name no target of any edit, with the least
    `E|W (k2 - k1)|^2`, by the first Linear that reads text. Concepts far nearer than half of them do not count: to the
    model they are the target already, as one that an earlier edit made it read so.

    Raises:
        ValueError: no preserved prompt differs from one that names the target in its words alone.
    """
    candidates = stand_ins(target, preserve, remaining)
    if not candidates:
        raise ValueError(
            f"`anchor` must be given for {target!r}, got None, and no preserved prompt has other words in its place."
        )
    source = TEXT if TEXT in reader.readers else next(iter(reader.readers))
    weight = read_weight(text_readers(reader.pipeline).get_submodule(reader.readers[source]))
    prompts = list(prompts)[: reader.batch_size]
    k1 = reader.all(prompts, source)
    distances = {}
    for words in candidates:
        k2 = in_places(reader, prompts, replaced(prompts, target, words), source, k1)
        distances[words] = ((k2 - k1) @ weight.T).square().mean().item()
    usual = median(distances.values())
    others = {words: distance for words, distance in distances.items() if distance > _ONE_CONCEPT * usual}
    chosen = min(others or distances, key=distances.get)
    logger.info("Anchor of %r: %r, of %d concepts.", target, chosen, len(candidates))
    return chosen

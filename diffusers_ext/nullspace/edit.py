"""Edit what a model knows in closed form (`edit_equations`): no training, an ordinary LoRA in seconds."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.concept_words import contains_concept
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.nullspace.edit_equations import (
    edit_matrix,
    effect_moments,
    in_places,
    layer_report,
    low_rank,
    preserved_moment,
    read_weight,
    target_moments,
)
from diffusers_ext.nullspace.edit_prompts import (
    ConceptEdit,
    EditPrompts,
    check_read_apart,
    replaced,
    split_prompts,
    stand_ins,
)
from diffusers_ext.nullspace.edit_report import EditForecast, EditReport, edit_warnings
from diffusers_ext.nullspace.lora_files import KOHYA_NAME, export_lora
from diffusers_ext.nullspace.lora_formats import has_kohya_names
from diffusers_ext.nullspace.statistics import TEXT
from diffusers_ext.nullspace.text_only import TextReader, lora_name, text_only_linears, text_readers

logger = logging.getLogger(__name__)
StateDict = dict[str, torch.Tensor]
REPORT_NAME = "edit_report.json"


@dataclass(frozen=True)
class EditedConcepts:
    """The result of `edit_concept`: a LoRA of scale 1, keys as in `read_lora`, and its report."""

    lora: StateDict
    report: EditReport
    edits: tuple[ConceptEdit, ...]

    @property
    def told(self) -> dict[str, str]:
        """What is edited, in words: target to anchor."""
        return {edit.target: edit.told for edit in self.edits}

    def save(self, output_dir: str | os.PathLike, *, base_model: str = "") -> Path:
        """Write the LoRA for diffusers, for ComfyUI, A1111 and kohya where it is a UNet's, and the report.

        Returns:
            The folder with `pytorch_lora_weights.safetensors`, `comfyui_a1111_kohya.safetensors`, `edit_report.json`.
        """
        folder = Path(output_dir)
        title = ", ".join(f"{target} -> {anchor or 'nothing'}" for target, anchor in self.told.items())
        metadata = {"modelspec.title": title, **({"ss_sd_model_name": base_model} if base_model else {})}
        export_lora(self.lora, "diffusers", folder / LORA_WEIGHT_NAME, metadata=metadata)
        if has_kohya_names(self.lora):
            export_lora(self.lora, "kohya", folder / KOHYA_NAME, metadata=metadata)
        report = {"edits": self.told, **dataclasses.asdict(self.report)}
        write_atomically(folder / REPORT_NAME, json.dumps(report, indent=2) + "\n")
        return folder


@torch.no_grad()
def edit_concept(
    pipeline: DiffusionPipeline,
    edits: Mapping[str, str | Mapping[str, float] | None] | Sequence[ConceptEdit],
    preserve: Sequence[str],
    *,
    negative_prompt: str = "",
    preserve_weight: float = 1.0,
    eps: float = 1e-4,
    hard: bool = False,
    kept: float = 0.9999,
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
        preserve_weight, eps, hard: see `edit_matrix`.
        kept: share of the update's effect on the targets that its rank keeps.
        expand_sub_phrases: also preserve every prompt with one word left out.
        batch_size: prompts read at once.
        call_arguments: for the pipeline's call, where its smallest one needs more than a size.

    Raises:
        ValueError: an edit or prompts as in `ConceptEdit` and `split_prompts`; an anchor that the text encoder cannot
            tell from its target; a denoiser that carries a LoRA.
    """
    started = time.perf_counter()
    if not 0 < kept <= 1:
        raise ValueError(f"`kept` must be above 0 and at most 1, got {kept}.")
    if isinstance(edits, Mapping):
        edits = [ConceptEdit(target, anchor) for target, anchor in edits.items()]
    if not edits:
        raise ValueError("`edits` must hold at least one target and its anchor, got none.")
    root = text_readers(pipeline)
    if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
        raise ValueError("`pipeline` must carry no LoRA while it is edited, got one. Fuse or unload it first.")
    sources = text_only_linears(pipeline, **call_arguments)
    reader = TextReader(pipeline, sources, batch_size, call_arguments)
    prompts, preserved = split_prompts(edits, preserve, expand_sub_phrases)
    prompts = _with_anchors(reader, prompts, preserve)
    check_read_apart(pipeline, prompts, preserved)
    lora: StateDict = {}
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    rows: list[dict[str, Any]] = []
    kept_whole = set(preserved)
    forecast = EditForecast(reader, prompts, [prompt for prompt in preserve if prompt in kept_whole])
    for source in dict.fromkeys(sources.values()):
        d_c, c1, c2 = target_moments(root, reader, prompts, source, updates)
        c0 = preserved_moment(reader, preserved, negative_prompt, source)
        matrix = edit_matrix(d_c, c1, c0, preserve_weight=preserve_weight, eps=eps, hard=hard, edits=len(edits))
        left, a, share = low_rank(matrix, c1, kept)
        missed, moved = effect_moments(left, a, d_c, c1, c2, c0)
        metric = torch.zeros_like(c1)
        for name in (name for name in sources if sources[name] == source):
            weight = read_weight(root.get_submodule(name))
            own = weight.T @ weight
            metric += own
            b = weight @ left
            key = lora_name(pipeline, name)
            lora[f"{key}.lora_A.weight"], lora[f"{key}.lora_B.weight"] = a.float(), b.float()
            updates[name] = a, b
            rows.append({"linear": name, "source": source, "rank": len(a), "kept": share})
            rows[-1] |= layer_report(own, missed, moved, c2, c0)
        forecast.add(source, left, a, metric)
    concepts = forecast.concepts()
    warnings = edit_warnings(concepts)
    for warning in warnings:
        logger.warning(warning)
    count = sum(len(edit.targets) for edit in prompts)
    seconds = time.perf_counter() - started
    report = EditReport(rows, concepts, forecast.most_moved, count, len(preserved), warnings, seconds)
    return EditedConcepts(lora, report, tuple(found.edit for found in prompts))


def _with_anchors(reader: TextReader, prompts: Sequence[EditPrompts], preserve: Sequence[str]) -> list[EditPrompts]:
    """The edits with the anchors found that are not given."""
    targets = [found.edit.target for found in prompts]
    remaining = [prompt for prompt in preserve if not any(contains_concept(prompt, target) for target in targets)]
    chosen = []
    for found in prompts:
        if found.edit.anchor is None:
            anchor = nearest_anchor(reader, found.edit.target, found.targets, preserve, remaining)
            found = dataclasses.replace(found, edit=dataclasses.replace(found.edit, anchor=anchor))
        chosen.append(found)
    return chosen


def nearest_anchor(
    reader: TextReader, target: str, prompts: Sequence[str], preserve: Sequence[str], remaining: Sequence[str]
) -> str:
    """The concept of the preserved prompts that the model reads most like the target.

    It is the one of `stand_ins` among the remaining prompts, which name no target of any edit, with the least
    `E|W (k2 - k1)|^2`, by the first Linear that reads text.

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
        k2 = in_places(reader, prompts, replaced(prompts, target, words), source, k1.shape[1])
        distances[words] = ((k2 - k1) @ weight.T).square().mean().item()
    chosen = min(distances, key=distances.get)
    logger.info("Anchor of %r: %r, of %d concepts.", target, chosen, len(candidates))
    return chosen

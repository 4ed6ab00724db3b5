"""Edit what a model knows in closed form: no training, an ordinary LoRA in seconds.

A Linear that reads text alone is to give for the target's tokens `k1` what it gives for the anchor's tokens `k2` in
their places, and to keep its outputs for the preserved tokens `k0`:

    min_D  E|D k1 - W (k2 - k1)|^2 + lambda E|D k0|^2 + eps tr(C1)/d |D|^2
    D = W M,  M = dC (C1 + lambda C0 + eps tr(C1)/d I)^-1,  dC = E[(k2 - k1) k1^T],  Ci = E[ki ki^T]

(the normal equations; AlphaEdit, arXiv 2410.02355, solves the same problem inside the null space of C0, which is
`hard=True`; UCE, arXiv 2308.14761, with the anchors of Stable Diffusion's cross-attention). M depends on the text
alone, so that one matrix serves all Linears that read the same tensor.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.core.concept_words import contains_concept
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.nullspace.edit_prompts import (
    ConceptEdit,
    EditPrompts,
    replaced,
    split_prompts,
    stand_ins,
    token_alignment,
)
from diffusers_ext.nullspace.lora_files import KOHYA_NAME, export_lora
from diffusers_ext.nullspace.lora_formats import has_kohya_names
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.text_only import TextReader, text_only_linears

logger = logging.getLogger(__name__)
StateDict = dict[str, torch.Tensor]
REPORT_NAME = "edit_report.json"
_MOST_MOVED = 5
# Of a token's energy: two prompts nearer than this are one to the model.
_SAME = 1e-10


def edit_matrix(
    d_c: torch.Tensor, c1: torch.Tensor, c0: torch.Tensor, *, preserve_weight: float, eps: float, hard: bool = False
) -> torch.Tensor:
    """`M` of the module's equations, `(dim, dim)`; the update of a Linear is `W M`.

    Args:
        d_c, c1, c0: `(dim, dim)` float64.
        preserve_weight: lambda.
        hard: `M` is zero on all that `c0` has seen; lambda then plays no part.

    Raises:
        ValueError: `hard`, and `c0` leaves no direction free.
    """
    dim = len(c1)
    ridge = eps * c1.diagonal().mean() * torch.eye(dim, dtype=c1.dtype, device=c1.device)
    if not hard:
        return torch.linalg.solve(c1 + preserve_weight * c0 + ridge, d_c.T).T
    values, vectors = torch.linalg.eigh(c0)
    free = null_dimensions(values, energy=0, floor=1e-12)
    if not free:
        raise ValueError(
            f"`preserve` must leave directions free for `hard=True`, got prompts that fill all {dim}. Preserve fewer, "
            "leave their sub-phrases out, or edit with `hard=False`."
        )
    basis = vectors[:, :free]
    return torch.linalg.solve(basis.T @ (c1 + ridge) @ basis, (d_c @ basis).T).T @ basis.T


def low_rank(matrix: torch.Tensor, c1: torch.Tensor, kept: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`M ~ U A` of the smallest rank that keeps a share of what `M` does to the target's tokens.

    `U` holds the leading left singular vectors of `M C1^(1/2)` and `A = U^T M`, so that the rows of A lie where those
    of M lie.

    Returns:
        `(dim, rank)`, `(rank, dim)`, and the share of `tr(M C1 M^T)` that is kept.
    """
    energies, vectors = torch.linalg.eigh(matrix @ c1 @ matrix.T)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    shares = energies.cumsum(0) / energies.sum()
    rank = min(int((shares < kept).sum()) + 1, len(shares))  # the last share may be rounded to below 1
    left = vectors[:, :rank]
    return left, left.T @ matrix, shares[rank - 1].item()


@dataclass(frozen=True)
class EditReport:
    """What an edit will do, computed from the text and the weights alone.

    Attributes:
        layers: one row per Linear: `linear`, `source`, `rank`, `achieved` (share of `E|W (k2 - k1)|^2` that the update
            makes up), `drift` (`tr(D C0 D^T) / tr(W C0 W^T)`).
        most_moved: the preserved prompts whose tokens move most, with their drift, the most first.
        edited_prompts, preserved_prompts: how many.
        seconds: of the whole computation.
    """

    layers: list[dict[str, Any]]
    most_moved: dict[str, float]
    edited_prompts: int
    preserved_prompts: int
    seconds: float


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
    denoiser = denoiser_of(pipeline)
    if any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
        raise ValueError("`pipeline` must carry no LoRA while it is edited, got one. Fuse or unload it first.")
    sources = text_only_linears(pipeline, **call_arguments)
    reader = TextReader(pipeline, sources, batch_size, call_arguments)
    prompts, preserved = split_prompts(edits, preserve, expand_sub_phrases)
    remaining = [prompt for prompt in preserve if not any(contains_concept(prompt, edit.target) for edit in edits)]
    edits = list(edits)
    for index, (edit, found) in enumerate(zip(edits, prompts)):
        if edit.anchor is None:
            anchor = nearest_anchor(reader, edit.target, found.targets, preserve, remaining)
            edits[index] = dataclasses.replace(edit, anchor=anchor)
    prompts, preserved = split_prompts(edits, preserve, expand_sub_phrases)
    prefix = next(name for name, module in pipeline.components.items() if module is denoiser)
    lora: StateDict = {}
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    rows: list[dict[str, Any]] = []
    with_sub_phrases = set(preserved)
    whole = [prompt for prompt in preserve if prompt in with_sub_phrases]
    moved = torch.zeros(2, len(whole), dtype=torch.float64)
    for source in dict.fromkeys(sources.values()):
        d_c, c1, c2 = _target_moments(denoiser, reader, prompts, source, updates)
        c0 = _preserved_moment(reader, preserved, negative_prompt, source)
        matrix = edit_matrix(d_c, c1, c0, preserve_weight=preserve_weight, eps=eps, hard=hard)
        left, a, share = low_rank(matrix, c1, kept)
        weights = {name: read_weight(denoiser.get_submodule(name)) for name in sources if sources[name] == source}
        metric = sum(weight.T @ weight for weight in weights.values())
        moved += _energies(reader, whole, source, left @ a, metric)
        for name, weight in weights.items():
            b = weight @ left
            lora[f"{prefix}.{name}.lora_A.weight"], lora[f"{prefix}.{name}.lora_B.weight"] = a.float(), b.float()
            updates[name] = a, b
            rows.append({"linear": name, "source": source, "rank": len(a), "kept": share})
            rows[-1] |= _layer_report(weight, left @ a, d_c, c1, c2, c0)
    drifts = dict(zip(whole, (moved[0] / moved[1]).tolist()))
    most = dict(sorted(drifts.items(), key=lambda item: -item[1])[:_MOST_MOVED])
    count = sum(len(edit.targets) for edit in prompts)
    report = EditReport(rows, most, count, len(preserved), time.perf_counter() - started)
    logger.info("Edited %d prompts in %.1f s; of the preserved ones %s move most.", count, report.seconds, most)
    return EditedConcepts(lora, report, tuple(edits))


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
    denoiser = denoiser_of(reader.pipeline)
    source = next(iter(reader.readers))
    weight = read_weight(denoiser.get_submodule(reader.readers[source]))
    prompts = list(prompts)[: reader.batch_size]
    k1 = reader.all(prompts, source)
    distances = {}
    for words in candidates:
        k2 = _in_places(reader, prompts, replaced(prompts, target, words), source)
        distances[words] = ((k2 - k1) @ weight.T).square().mean().item()
    chosen = min(distances, key=distances.get)
    logger.info("Anchor of %r: %r, of %d concepts.", target, chosen, len(candidates))
    return chosen


def _in_places(reader: TextReader, targets: Sequence[str], anchors: Sequence[str], source: str) -> torch.Tensor:
    """What is read for the anchors' prompts, each token in the place of the target's that it stands for."""
    read = reader.all(anchors, source)
    places = token_alignment(reader.pipeline, targets, anchors, read.shape[1]).to(read.device)
    return read.gather(1, places[..., None].expand(-1, -1, read.shape[-1]))


def _target_moments(
    denoiser: torch.nn.Module,
    reader: TextReader,
    edits: Sequence[EditPrompts],
    source: str,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dC`, `C1` and `E[(k2 - k1) (k2 - k1)^T]`, summed over the edits.

    Targets are read with the updates of earlier Linears in place, so that deeper ones correct what is left.
    """
    total: list[torch.Tensor] = []
    for edit in edits:
        with added_updates(denoiser, updates):
            k1 = reader.all(edit.targets, source)
        k2 = torch.zeros_like(k1)
        for words, weight in edit.edit.weights.items():
            k2 += weight * _in_places(reader, edit.targets, edit.anchors[words], source)
        change, rows = (k2 - k1).flatten(0, 1), k1.flatten(0, 1)
        if change.square().sum() <= _SAME * rows.square().sum() and not updates:
            raise ValueError(
                f"`anchor` must be read otherwise than `target`, got {edit.edit.anchor!r} for {edit.edit.target!r}, "
                "whose tokens are the same."
            )
        parts = torch.stack([change.T @ rows, rows.T @ rows, change.T @ change]) / len(rows)
        total.append(parts)
    d_c, c1, c2 = torch.stack(total).sum(0)
    return d_c, c1, c2


def _preserved_moment(reader: TextReader, preserved: Sequence[str], negative_prompt: str, source: str) -> torch.Tensor:
    """`C0`: half of it the preserved prompts, half the unconditional ones."""
    halves = []
    for prompts in (preserved, unique(["", negative_prompt])):
        moment = None
        for rows in reader.batches(prompts, source):
            moment = moment or SecondMoment(rows.shape[-1], rows.device, torch.float64)
            moment.update(rows)
        moment.check_finite(source)
        halves.append(moment.mean)
    return (halves[0] + halves[1]) / 2


def _energies(
    reader: TextReader, prompts: Sequence[str], source: str, matrix: torch.Tensor, metric: torch.Tensor
) -> torch.Tensor:
    """`|W M k|^2` and `|W k|^2` of every prompt, `(2, prompts)`, summed over tokens and Linears."""
    both = torch.stack([matrix.T @ metric @ matrix, metric])
    batches = reader.batches(prompts, source)
    return torch.cat([torch.einsum("btd,mde,bte->mb", k, both, k) for k in batches], dim=1).cpu()


def _layer_report(
    weight: torch.Tensor, matrix: torch.Tensor, d_c: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c0: torch.Tensor
) -> dict[str, float]:
    # E (M k1 - (k2 - k1)) (..)^T = M C1 M^T - dC M^T - M dC^T + E (k2 - k1) (k2 - k1)^T
    cross = d_c @ matrix.T
    left = matrix @ c1 @ matrix.T - cross - cross.T + c2

    def energy(moment: torch.Tensor) -> float:
        return ((weight @ moment) * weight).sum().item()

    return {"achieved": 1 - energy(left) / energy(c2), "drift": energy(matrix @ c0 @ matrix.T) / energy(c0)}


def read_weight(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a Linear in float64, `(out_features, in_features)`; of a quantised one by what it computes."""
    weight = linear.weight
    if weight.is_floating_point() and weight.shape == (linear.out_features, linear.in_features):
        return weight.double()
    unit = torch.eye(
        linear.in_features, device=weight.device, dtype=getattr(linear, "compute_dtype", None) or torch.float32
    )
    outputs = linear(unit)
    return (outputs - linear(torch.zeros_like(unit[:1]))).double().T


@contextmanager
def added_updates(
    denoiser: torch.nn.Module, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Let Linears compute `W x + B A x` in calls of this thread; no weight is touched.

    Args:
        updates: `{dotted name: (A, B)}`.
    """
    with CallScope() as scope, ExitStack() as hooks:
        for name, (a, b) in updates.items():

            def add(_: torch.nn.Module, args: tuple, output: torch.Tensor, a: Any = a, b: Any = b) -> torch.Tensor:
                return output + (args[0].to(a) @ a.T @ b.T).to(output) if scope.covers_this_call() else output

            hooks.callback(denoiser.get_submodule(name).register_forward_hook(add).remove)
        yield

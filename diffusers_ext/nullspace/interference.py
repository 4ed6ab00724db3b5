"""How far several LoRAs that are used at once disturb each other's subjects and what is preserved, without a picture.

With `D_i = B_i A_i` the update of a weight `W` by LoRA `i`, and `C` the second moment of what a set of prompts reads,
outputs move by `tr(D_i C D_i^T) / tr(W C W^T)` of their energy, and by `sum_ij tr(D_i C D_j^T) / tr(W C W^T)` under
all LoRAs together. What two of them read in common is told by the principal angles between the rows of their updates,
in the metric `C` (Bjorck, Golub 1973).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_ext.core.lora_formats import check_lora_effect
from diffusers_ext.core.restored_state import held_attribute
from diffusers_ext.families.lora_files import LoraSource, StateDict, read_lora
from diffusers_ext.hub.safe_markdown import markdown_table
from diffusers_ext.nullspace.debleed import (
    lora_modules,
    measured_linears,
    statistic_name,
    uncovered_modules,
    with_text_encoders,
)
from diffusers_ext.nullspace.edit_equations import read_weight
from diffusers_ext.nullspace.lora import instance_statistics_like
from diffusers_ext.nullspace.prompts import check_prompts
from diffusers_ext.nullspace.statistics import FeatureStatistics

PRESERVED, TOGETHER = "preserved", "together"
Update = tuple[torch.Tensor, torch.Tensor]  # A `(rank, in)` and B `(out, rank)`
# Of the energy of the strongest direction; weaker ones are rounding.
_NO_DIRECTION = 1e-10


@dataclass(frozen=True)
class InterferenceReport:
    """How far LoRAs move each other's subjects and what is preserved, by statistics and weights alone.

    Attributes:
        moved: `{reading: {LoRA: drift}}`, a reading being what is read for the subject prompts of a LoRA, or for the
            `"preserved"` ones: `tr(D C D^T) / tr(W C W^T)`, mean over `linears`; `"together"` is all LoRAs added up.
        pairs: one row for every two: `loras`; `shares`, `{LoRA: what the other one moves on its subject prompts, as a
            share of what it moves there itself}` (`None` where that is nothing); `preserved`, the drift of both added
            up; `cosine` of what they do there (1: they add up, -1: they cancel); and of the Linears that both change
            `overlap`, the mean squared cosine of their principal angles in the metric of all readings, and
            `angle`, the smallest of these in degrees, at `linear` (all three `None` where they share none).
        linears: that a LoRA changes and the statistics cover.
        uncovered: `{LoRA: modules}` without a statistic: nothing is known of what they do.
    """

    moved: dict[str, dict[str, float]]
    pairs: list[dict[str, Any]]
    linears: list[str]
    uncovered: dict[str, list[str]]

    def to_table(self) -> str:
        """Two Markdown tables: what each LoRA moves, and how every two of them meet."""
        moved = [[by, *(_cell(self.moved[reading][by]) for reading in self.moved)] for by in self.moved[PRESERVED]]
        pairs = [
            [
                " and ".join(row["loras"]),
                *(_cell(row["shares"][name]) for name in row["loras"]),
                *(_cell(row[figure]) for figure in ("preserved", "cosine", "overlap", "angle")),
            ]
            for row in self.pairs
        ]
        moved.insert(0, ["moves what is read for", *self.moved])
        pairs.insert(
            0,
            ["together", "first's subject by second", "second's by first", "preserved", "cosine", "overlap", "angle"],
        )
        return "\n\n".join(markdown_table(table, len(table[0])) for table in (moved, pairs))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def interference_report(
    pipeline: DiffusionPipeline,
    loras: Mapping[str, LoraSource | None],
    statistics: FeatureStatistics,
    subject_prompts: Mapping[str, Sequence[str]],
    *,
    weights: Mapping[str, float] | None = None,
    text_encoders: bool = False,
) -> InterferenceReport:
    """Tell how LoRAs that are to be used together disturb each other; no picture is drawn.

    Args:
        pipeline: the base model of `statistics`, which reads the prompts. LoRAs that it carries do not act on what is
            read, and all of it is left as it was.
        loras: `{name: LoRA}`, as in `read_lora`; `None` for the loaded adapter of this name, as it is scaled now.
        statistics: of the preserved prompts.
        subject_prompts: `{name: prompts}` that ask for what each LoRA is for.
        weights: `{name: weight}` that the adapters will be given; 1 for the others.
        text_encoders: also what LoRAs change in text encoders, as in `debleed_lora`.

    Raises:
        ValueError: fewer than two LoRAs, one without prompts, or one of which the statistics cover no module.
    """
    weights = weights or {}
    if len(loras) < 2 or {PRESERVED, TOGETHER} & loras.keys():
        raise ValueError(f"`loras` must be two or more, none named {PRESERVED!r} or {TOGETHER!r}, got {list(loras)}.")
    if subject_prompts.keys() != loras.keys() or not weights.keys() <= loras.keys():
        raise ValueError(
            f"`subject_prompts` must be given for each of {list(loras)}, and `weights` for no other, got "
            f"{list(subject_prompts)} and {list(weights)}."
        )
    given = {name: loaded_lora(pipeline, name) if lora is None else read_lora(lora) for name, lora in loras.items()}
    for name, lora in given.items():
        check_lora_effect(lora)
        check_prompts(subject_prompts[name], f"subject_prompts[{name!r}]")
    with _without_loras(pipeline):
        statistics.check_pipeline(pipeline)
        readings = {name: instance_statistics_like(pipeline, statistics, subject_prompts[name]) for name in loras}
        readings[PRESERVED] = statistics
        if text_encoders:
            changed = {key: tensor for lora in given.values() for key, tensor in lora.items()}
            readings = {name: with_text_encoders(found, pipeline, changed) for name, found in readings.items()}
        updates = {name: _updates(lora, readings[PRESERVED], weights.get(name, 1.0)) for name, lora in given.items()}
        changed_linears = {linear for found in updates.values() for linear in found}
        linears = [linear for linear in readings[PRESERVED].linears if linear in changed_linears]
        uncovered = {name: uncovered_modules(lora, readings[PRESERVED]) for name, lora in given.items()}
        bare = [name for name, found in updates.items() if not found]
        if bare:
            raise ValueError(
                f"`statistics` must cover modules of every LoRA, got none of {bare[0]!r}, the first of whose "
                f"{len(uncovered[bare[0]])} is {uncovered[bare[0]][0]!r}. Collect more features, or pass "
                "`text_encoders=True` for those of text encoders."
            )
        return _report(measured_linears(pipeline, linears), updates, readings, uncovered)


def _updates(lora: StateDict, statistics: FeatureStatistics, weight: float) -> dict[str, Update]:
    """A and B of the Linears that statistics cover, in float64."""
    found = {}
    for module in lora_modules(lora):
        name = statistic_name(module)
        if name in statistics.sources:
            a, b = (lora[f"{module}.lora_{part}.weight"].double() for part in "AB")
            found[name] = a, b * weight
    return found


def _report(
    linears: Mapping[str, torch.nn.Module],
    updates: Mapping[str, Mapping[str, Update]],
    readings: Mapping[str, FeatureStatistics],
    uncovered: dict[str, list[str]],
) -> InterferenceReport:
    """Linear by Linear, so that one weight and its moments are held at a time."""
    names = list(updates)
    drifts = {reading: torch.zeros(len(names), len(names), dtype=torch.float64) for reading in readings}
    cosines: dict[tuple[str, str], dict[str, torch.Tensor]] = {pair: {} for pair in combinations(names, 2)}
    for linear, module in linears.items():
        weight = read_weight(module)
        metric = weight.T @ weight
        moments = {name: found.moments[found.key(linear)].mean.to(weight) for name, found in readings.items()}
        own = {
            name: tuple(part.to(weight) for part in updates[name][linear]) for name in names if linear in updates[name]
        }
        rows = [names.index(name) for name in own]
        for reading, moment in moments.items():
            products = update_products(list(own.values()), moment) / (metric * moment).sum()
            drifts[reading][torch.tensor(rows)[:, None], rows] += products.cpu() / len(linears)
        shared = sum(moments.values()) / len(moments)
        for first, second in combinations(own, 2):
            cosines[first, second][linear] = principal_cosines(own[first], own[second], shared)
    moved = {
        reading: {**dict(zip(names, found.diagonal().tolist())), TOGETHER: found.sum().item()}
        for reading, found in drifts.items()
    }
    pairs = [_pair(names, pair, drifts, found) for pair, found in cosines.items()]
    return InterferenceReport(moved, pairs, list(linears), uncovered)


def _pair(
    names: Sequence[str],
    pair: tuple[str, str],
    drifts: Mapping[str, torch.Tensor],
    cosines: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """A row of `InterferenceReport.pairs`."""
    places = [names.index(name) for name in pair]
    shares = {}
    for name, other in (pair, pair[::-1]):
        by_itself, by_other = (drifts[name].diagonal()[names.index(one)].item() for one in (name, other))
        shares[name] = by_other / by_itself if by_itself > 0 else None
    both = drifts[PRESERVED][places][:, places]
    sizes = both.diagonal().prod().sqrt().item()
    row = {
        "loras": list(pair),
        "shares": shares,
        "preserved": both.sum().item(),
        "cosine": both[0, 1].item() / sizes if sizes > 0 else None,
        "overlap": None,
        "angle": None,
        "linear": None,
    }
    found = {linear: values for linear, values in cosines.items() if len(values)}
    if found:
        nearest = max(found, key=lambda linear: found[linear][0].item())
        row["overlap"] = sum(values.square().mean().item() for values in found.values()) / len(found)
        row["angle"] = math.degrees(math.acos(found[nearest][0].item()))
        row["linear"] = nearest
    return row


def update_products(updates: Sequence[Update], moment: torch.Tensor) -> torch.Tensor:
    """`tr(D_i C D_j^T)` of every two of the updates `D = B A`, at the cost of their ranks."""
    a, b = torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], 1)
    products = (a @ moment @ a.T) * (b.T @ b)
    ranks = [len(part) for part, _ in updates]
    return torch.stack([torch.stack([x.sum() for x in row.split(ranks, 1)]) for row in products.split(ranks)])


def principal_cosines(first: Update, second: Update, moment: torch.Tensor) -> torch.Tensor:
    """Cosines of the principal angles, the smallest angle first, between what two updates read, in a metric.

    What an update reads is spanned by the rows of `(B^T B)^(1/2) A`, which B does not cancel.
    """
    bases = []
    for a, b in (first, second):
        scales, vectors = torch.linalg.eigh(b.T @ b)
        rows = (scales.clamp_min(0).sqrt()[:, None] * vectors.T) @ a
        energies, vectors = torch.linalg.eigh(rows @ moment @ rows.T)
        used = energies > max(_NO_DIRECTION * energies[-1].item(), 0.0)
        bases.append((vectors[:, used] / energies[used].sqrt()).T @ rows)
    return torch.linalg.svdvals(bases[0] @ moment @ bases[1].T).clamp(0, 1)


def loaded_lora(pipeline: DiffusionPipeline, adapter_name: str) -> StateDict:
    """The LoRA that a pipeline has loaded under a name, as `read_lora` gives it, by its present scale.

    Raises:
        ValueError: no such adapter, or one that is more than A and B.
    """
    lora: StateDict = {}
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for component, model in models.items():
        for name, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer) or adapter_name not in getattr(layer, "lora_A", ()):
                continue
            if layer.use_dora.get(adapter_name) or layer.lora_bias.get(adapter_name):
                raise ValueError(
                    f"`loras` must have A and B alone, got the adapter {adapter_name!r} with DoRA or a bias."
                )
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            lora[f"{component}.{name}.lora_A.weight"] = a.detach()
            lora[f"{component}.{name}.lora_B.weight"] = b.detach() * layer.scaling[adapter_name]
    if not lora:
        raise ValueError(f"`pipeline` must have loaded the adapter {adapter_name!r}, got none of this name.")
    return read_lora(lora)


@contextmanager
def _without_loras(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The base layers of a pipeline in the places of those of PEFT, which come back."""
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    children = [
        (parent, *child) for model in models for parent in model.modules() for child in parent.named_children()
    ]
    with ExitStack() as places:
        for parent, name, layer in children:
            if isinstance(layer, BaseTunerLayer):
                if layer.merged:
                    raise ValueError("`pipeline` must have no fused LoRA, got one. Call `unfuse_lora` first.")
                places.enter_context(held_attribute(parent, name, layer.get_base_layer()))
        yield

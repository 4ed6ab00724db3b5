"""What an edit of knowledge will do: told from the text and the weights alone, before anything is written or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from diffusers_ext.core.concept_words import concept_spans, contains_concept
from diffusers_ext.nullspace.edit_equations import in_places
from diffusers_ext.nullspace.edit_prompts import EditPrompts, replaced
from diffusers_ext.nullspace.text_only import TextReader

# From what share on a neighbour is warned of, and below what achieved share an edit is: measured by
# `benchmarks/near_concepts_on_digits.py`.
NEAR, ACHIEVED = 0.15, 0.8
_MOST_MOVED = 5
_PROMPTS_PER_NEIGHBOUR = 4


@dataclass(frozen=True)
class EditReport:
    """What an edit will do, computed from the text and the weights alone.

    Attributes:
        layers: one row per Linear: `linear`, `source`, `rank`, `achieved` (share of `E|W (k2 - k1)|^2` that the update
            makes up), `drift` (`tr(D C0 D^T) / tr(W C0 W^T)`).
        concepts: one row per edit: `target`, `anchor`, `weights` (of the anchor's words), `prompts` (how many are
            edited), `named` (preserved prompts that name the target; they are edited, too, unless it has
            `own_prompts`), `achieved`, and `neighbours`, `{words: share}` of the preserved concepts that move most
            with it (`EditForecast`).
        most_moved: the preserved prompts whose tokens move most, with their drift, the most first.
        edited_prompts, preserved_prompts: how many.
        warnings: what of this is likely to be unwanted, in words.
        seconds: of the whole computation.
    """

    layers: list[dict[str, Any]]
    concepts: list[dict[str, Any]]
    most_moved: dict[str, float]
    edited_prompts: int
    preserved_prompts: int
    warnings: list[str]
    seconds: float


class Neighbour(NamedTuple):
    """A preserved concept that stands where an edited one does: "nine" in "a red nine" for "a red three"."""

    words: str
    prompts: list[str]


def neighbours(edit: EditPrompts, preserved: Sequence[str]) -> list[Neighbour]:
    """The concepts of preserved prompts that differ from an edited one in one place alone, but for the anchor itself.

    Of a prompt that differs from several the fewest words count, and words with a shorter concept in them count as it.
    """
    frames = {
        (prompt[:start], prompt[end:])
        for prompt in edit.targets
        for start, end in concept_spans(prompt, edit.edit.target)
    } - {("", "")}
    found: dict[str, list[str]] = {}
    for prompt in preserved:
        words = [
            prompt[len(before) : len(prompt) - len(after)]
            for before, after in frames
            if prompt.startswith(before) and prompt.endswith(after) and len(before) + len(after) < len(prompt)
        ]
        nearest = min((one for one in words if one == one.strip()), key=len, default=None)
        if nearest is not None and nearest not in edit.edit.weights:
            found.setdefault(nearest, []).append(prompt)
    merged: dict[str, list[str]] = {}
    for words in sorted(found, key=len):
        name = next((shorter for shorter in merged if contains_concept(words, shorter)), words)
        merged.setdefault(name, []).extend(found[words])
    return [Neighbour(words, prompts[:_PROMPTS_PER_NEIGHBOUR]) for words, prompts in merged.items()]


class EditForecast:
    """Gathers, source by source, what a solved edit does to its targets and to what is preserved.

    With the update `W M`, tokens `k` of a prompt, `k'` of the same prompt with the anchor in the place of a concept's
    words, and sums over tokens, prompts and Linears (for the first two, those that read what no update changes):

    - an edit achieves `1 - |W (M k - (k' - k))|^2 / |W (k' - k)|^2` of what it is for, `k` being its targets',
    - a neighbour moves by `|W M k|^2 / |W (k' - k)|^2`, where 1 is as far as the anchor is,
    - a preserved prompt drifts by `|W M k|^2 / |W k|^2`.

    Args:
        preserved: without the phrases made of them.
    """

    def __init__(self, reader: TextReader, edits: Sequence[EditPrompts], preserved: Sequence[str]) -> None:
        self.reader, self.edits, self.preserved = reader, edits, list(preserved)
        self.neighbours = [neighbours(edit, preserved) for edit in edits]
        self._missed = [torch.zeros(2, dtype=torch.float64) for _ in edits]
        self._moved_along = [torch.zeros(2, len(found), dtype=torch.float64) for found in self.neighbours]
        self._moved = torch.zeros(2, len(self.preserved), dtype=torch.float64)

    def add(self, source: str, left: torch.Tensor, a: torch.Tensor, metric: torch.Tensor) -> None:
        """Count a source: its `M = left a`, and the sum of `W^T W` over the Linears that read it."""
        across = metric @ left
        inner, told = left.T @ across, metric.float()  # products of all tokens at the weights' own precision
        for start, k in zip(
            range(0, len(self.preserved), self.reader.batch_size), self.reader.batches(self.preserved, source)
        ):
            x = k @ a.T
            self._moved[0, start : start + len(k)] += ((x @ inner) * x).sum((1, 2)).cpu()
            self._moved[1, start : start + len(k)] += ((k.float() @ told) * k).sum((1, 2)).cpu()
        if source not in self.reader.handed and any(missed[1] for missed in self._missed):
            return
        for edit, found, missed, along in zip(self.edits, self.neighbours, self._missed, self._moved_along):
            for k, change in self._changes(edit.targets, edit.anchors, source):
                x, far = k @ a.T, ((change.float() @ told) * change).sum()
                missed += torch.stack([((x @ inner - 2 * change @ across) * x).sum() + far, far]).cpu()
            for index, (words, prompts) in enumerate(found):
                anchors = [(replaced(prompts, words, anchor), weight) for anchor, weight in edit.edit.weights.items()]
                for k, change in self._changes(prompts, anchors, source):
                    x, far = k @ a.T, ((change.float() @ told) * change).sum()
                    along[:, index] += torch.stack([((x @ inner) * x).sum(), far]).cpu()

    def _changes(
        self, prompts: Sequence[str], anchors: Sequence[tuple[list[str], torch.Tensor | float]], source: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is read for prompts, and what is missing to what is read for mixtures of others in their places."""
        size = self.reader.batch_size
        for start in range(0, len(prompts), size):
            now = slice(start, start + size)
            k = self.reader.all(prompts[now], source)
            change = -k
            for words, weight in anchors:
                weight = weight[now].to(k) if isinstance(weight, torch.Tensor) else weight
                change = change + weight * in_places(self.reader, prompts[now], words[now], source, k)
            yield k, change

    @property
    def most_moved(self) -> dict[str, float]:
        """The preserved prompts that drift most, the most first."""
        drifts = dict(zip(self.preserved, (self._moved[0] / self._moved[1]).tolist()))
        return dict(sorted(drifts.items(), key=lambda item: -item[1])[:_MOST_MOVED])

    def concepts(self) -> list[dict[str, Any]]:
        """As in `EditReport`."""
        rows = []
        for edit, found, missed, along in zip(self.edits, self.neighbours, self._missed, self._moved_along):
            shares = {one.words: (moved / far).item() for one, (moved, far) in zip(found, along.T) if far > 0}
            most = dict(sorted(shares.items(), key=lambda item: -item[1])[:_MOST_MOVED])
            rows.append(
                {
                    "target": edit.edit.target,
                    "anchor": edit.edit.told,
                    "weights": dict(edit.edit.weights),
                    "prompts": len(edit.targets),
                    "named": edit.named,
                    "own_prompts": bool(edit.edit.prompts),
                    "achieved": 1 - (missed[0] / missed[1]).item(),
                    "neighbours": most,
                }
            )
        return rows


def edit_warnings(concepts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a report's concepts is likely to be unwanted, in words."""
    said = []
    for row in concepts:
        target, anchor = row["target"], row["anchor"] or "the empty prompt"
        near = [f"{words!r} by {share:.2f}" for words, share in row["neighbours"].items() if share >= NEAR]
        if near:
            said.append(
                f"Preserved concepts lie too near {target!r} and move with it, where 1 is as far as {anchor!r} is "
                f"from them: {', '.join(near)}. Raise `preserve_weight`, preserve more prompts that name them, or "
                "choose another anchor."
            )
        if row["achieved"] < ACHIEVED:
            said.append(
                f"What is preserved holds {target!r} fast: {row['achieved']:.0%} of the way to {anchor!r} is made. "
                "Lower `preserve_weight`, preserve fewer prompts, make fewer edits at once, or choose another anchor."
            )
        if row["own_prompts"] and row["named"]:
            said.append(
                f"{len(row['named'])} preserved prompts name {target!r} and are kept as they are, such as "
                f"{row['named'][0]!r}: only the edit's own prompts are edited."
            )
        elif not row["own_prompts"] and not row["named"]:
            said.append(f"No preserved prompt names {target!r}: it is edited in the usual templates alone.")
    return said

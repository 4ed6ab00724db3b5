"""Concepts of the digits model edited in closed form, against UCE, SPEED, ESD-x and a negative prompt.

python benchmarks/editing_on_digits.py --seeds 5
python benchmarks/editing_on_digits.py --model examples/digits_flux2/model
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.baselines.esd import erase_by_training
from benchmarks.baselines.speed import speed
from benchmarks.baselines.uce import unified_concept_edit
from benchmarks.machine import table, write_results
from diffusers_ext.nullspace.edit import edit_concept
from examples.digits.check_model import MODEL_DIR, draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import (
    COLORS,
    DIGITS,
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPLATE,
    TEMPLATES,
    TRAINING_PAIRS,
    prompt_pairs,
    read_prompt,
)
from examples.digits.subjects import knowledge_prompts

FIVE = ("one", "three", "five", "seven", "eight")
ALL_PAIRS = (*TRAINING_PAIRS, *HELD_OUT_PAIRS)
Shares = dict[str, float]


class Case(NamedTuple):
    """One row of the results."""

    name: str
    targets: tuple[str, ...]
    method: str  # "edit", "uce", "uce of prompts", "speed", "esd" or "negative prompt"
    one_by_one: bool = False
    rate: float | None = None  # of ESD-x


CLOSED_FORMS = ("edit", "uce", "speed")
METHODS = (*CLOSED_FORMS, "uce of prompts", "negative prompt", "esd")
COLORS_EDITED = ("red", "blue")
SOME_DIGITS = ("three", "seven", "eight")
CASES = [
    *(Case(digit, (digit,), method) for digit in DIGITS for method in (*CLOSED_FORMS, "negative prompt")),
    *(Case(digit, (digit,), "uce of prompts") for digit in SOME_DIGITS),
    *(Case(color, (color,), method) for color in COLORS_EDITED for method in CLOSED_FORMS),
    *(Case("five at once", FIVE, method) for method in CLOSED_FORMS),
    *(Case("five one by one", FIVE, method, one_by_one=True) for method in CLOSED_FORMS),
]
# The paper's, and larger ones for so small a model: all are shown, because the largest ruins the other digits.
ESD_RATES = (1e-5, 3e-5, 1e-4)


def cases_of(seed: int, methods: Sequence[str], trained_seeds: int) -> list[Case]:
    """All cases of a seed; ESD-x trains for minutes, so it erases one digit a seed, in the first seeds alone."""
    digit = DIGITS[(3 + 2 * seed) % len(DIGITS)]
    trained = [Case(digit, (digit,), "esd", rate=rate) for rate in ESD_RATES] if seed < trained_seeds else []
    return [case for case in (*CASES, *trained) if case.method in methods]


def groups(targets: Sequence[str], seed: int, count: int) -> dict[str, list[str]]:
    """Prompts that name a target and others, in the known templates and in one that nothing has seen."""
    generator = np.random.default_rng(seed)
    found = {}
    for kind, templates in (("known", TEMPLATES), ("unseen", [HELD_OUT_TEMPLATE])):
        prompts = [prompt for template in templates for prompt in prompt_pairs(template, ALL_PAIRS)]
        for name, wanted in (("target", True), ("others", False)):
            chosen = [prompt for prompt in prompts if bool({*targets} & {*prompt.split()}) is wanted]
            found[f"{name} {kind}"] = [chosen[i] for i in generator.choice(len(chosen), count)]
    return found


class Examiner:
    """Draws a seed's prompts with the base model once, and compares edited models with it."""

    def __init__(self, seed: int, count: int, model: str) -> None:
        self.judge, self.seed, self.count, self.model = DigitsJudge(), seed, count, model
        self._base: dict[tuple[str, ...], dict[str, list[Image.Image]]] = {}

    def _draw(self, pipeline: Any, targets: tuple[str, ...], **call: Any) -> dict[str, list[Image.Image]]:
        first = 10_000 * (self.seed + 1)
        found = groups(targets, self.seed, self.count).items()
        return {name: draw(pipeline, prompts, seed=first, description=name, **call) for name, prompts in found}

    def examine(self, pipeline: Any, targets: tuple[str, ...], **call: Any) -> tuple[Shares, Shares]:
        """Figures of the base model and of an edited one.

        Shares of pictures that still show the target, or that show what the other prompts ask for; and their mean
        absolute difference from the base model's pictures of the same seeds.
        """
        if targets not in self._base:
            self._base[targets] = self._draw(load_pipeline(self.model), targets)
        base, edited = self._base[targets], self._draw(pipeline, targets, **call)
        sides = [self._shares(pictures, targets) for pictures in (base, edited)]
        for name in ("others known", "others unseen"):
            difference = [
                np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() / 255
                for a, b in zip(base[name], edited[name], strict=True)
            ]
            sides[0][f"drift {name}"], sides[1][f"drift {name}"] = 0.0, float(np.mean(difference))
        return sides[0], sides[1]

    def _shares(self, pictures: Mapping[str, list[Image.Image]], targets: tuple[str, ...]) -> Shares:
        shares = {}
        for name, prompts in groups(targets, self.seed, self.count).items():
            reading = self.judge.read(pictures[name])
            right = []
            for prompt, digit, color in zip(prompts, reading.names, reading.colors):
                asked_color, asked_digit = read_prompt(prompt)
                if name.startswith("target"):
                    right.append({asked_color, asked_digit} & {*targets} <= {digit, color})
                else:
                    right.append(digit == asked_digit and color == asked_color)
            shares[name] = float(np.mean(right))
        return shares


def names_of(targets: Sequence[str]) -> list[str]:
    """The concepts to preserve, by their bare names."""
    return [word for word in (*DIGITS, *COLORS) if word not in targets]


def changed(
    pipeline: Any, case: Case, targets: Sequence[str], anchors: Mapping[str, str], earlier: Mapping[str, str]
) -> Mapping[str, str]:
    """Put one edit of a case's targets into the model; returns what stands for what."""
    if case.method == "edit":
        result = edit_concept(pipeline, dict.fromkeys(targets), knowledge_prompts(), earlier=earlier)
        pipeline.load_lora_weights(result.lora)
        return result.told
    if case.method == "negative prompt":
        return {}
    anchors = {target: anchors[target] for target in targets}
    if case.method == "uce":
        pipeline.load_lora_weights(unified_concept_edit(pipeline, anchors, names_of(targets)))
    elif case.method == "uce of prompts":
        kept = [prompt for prompt in knowledge_prompts() if not {*prompt.split()} & {*targets}]
        pipeline.load_lora_weights(unified_concept_edit(pipeline, anchors, kept))
    elif case.method == "speed":
        pipeline.load_lora_weights(speed(pipeline, anchors, names_of(targets)))
    elif case.method == "esd":
        own = [prompt for prompt in knowledge_prompts() if {*prompt.split()} & {*targets}]
        erase_by_training(pipeline, own, learning_rate=case.rate)
    return anchors


def edit(pipeline: Any, case: Case, anchors: Mapping[str, str]) -> tuple[float, dict[str, str]]:
    """Put a case's edit into the model; returns seconds of one core, and what stands for what.

    Args:
        anchors: of the same targets, as `edit_concept` has found them; all methods share them.
    """
    started, told = time.process_time(), {}
    if not case.one_by_one:
        told = dict(changed(pipeline, case, case.targets, anchors, {}))
        return time.process_time() - started, told
    for target in case.targets:
        told |= changed(pipeline, case, (target,), anchors, told)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return time.process_time() - started, told


def run_seed(
    seed: int, count: int, model: str, methods: Sequence[str], trained_seeds: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """All cases of one seed, or those of some names, and the base model on the same prompts."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    examiner, rows = Examiner(seed, count, model), []
    anchors: dict[tuple[str, ...], dict[str, str]] = {}
    for case in (case for case in cases_of(seed, methods, trained_seeds) if case.name in names):
        pipeline = load_pipeline(model)
        seconds, told = edit(pipeline, case, anchors.get(case.targets, {}))
        if case.method == "edit":
            anchors.setdefault(case.targets, told)  # of one edit of all: none is another target
        call = {"negative_prompt": case.targets[0]} if case.method == "negative prompt" else {}
        base, edited = examiner.examine(pipeline, case.targets, **call)
        rows.append(
            {"case": case.name, "method": case.method, "base": base, "edited": edited}
            | {"seconds": seconds, "anchors": told, "rate": case.rate}
        )
    return rows


LABELS = {
    "edit": "**edit_concept**",
    "uce": "UCE",
    "uce of prompts": "UCE, the edit's prompts preserved",
    "speed": "SPEED",
}
SITUATIONS = {
    "each of ten digits": (DIGITS, (*CLOSED_FORMS, "negative prompt")),
    "three, seven, eight": (SOME_DIGITS, ("edit", "uce", "uce of prompts")),
    "red and blue": (COLORS_EDITED, CLOSED_FORMS),
    "five digits at once": (("five at once",), CLOSED_FORMS),
    "five one by one": (("five one by one",), CLOSED_FORMS),
}


def summarize(seeds: list[list[dict[str, Any]]]) -> str:
    """The table: mean over seeds and concepts, the worst in brackets."""
    names = list(seeds[0][0]["edited"])
    runs = [row for rows_of_seed in seeds for row in rows_of_seed]

    def line(label: str, found: Sequence[dict[str, Any]], side: str = "edited") -> list[str]:
        cells = []
        for name in names:
            values = [row[side][name] for row in found]
            worst = min(values) if name.startswith("others") else max(values)
            places = 4 if name.startswith("drift") else 3
            cells.append(f"{np.mean(values):.{places}f} ({worst:.{places}f})")
        quick = side == "base" or found[0]["method"] == "negative prompt"
        return [label, *cells, "-" if quick else f"{np.median([row['seconds'] for row in found]):.1f}"]

    def of(method: str, cases: Sequence[str]) -> list[dict[str, Any]]:
        return [row for row in runs if row["method"] == method and row["case"] in cases]

    rows = []
    asked = {name: wanted for name, wanted in SITUATIONS.items() if of("edit", wanted[0])}
    for situation, (cases, methods) in asked.items():
        rows.append(line(f"{situation}: base", of("edit", cases), "base"))
        rows += [line(f"{situation}: {LABELS.get(m, m)}", of(m, cases)) for m in methods if of(m, cases)]
    trained = [row for row in runs if row["method"] == "esd"]
    erased = [(seed, row["case"]) for seed, found in enumerate(seeds) for row in found if row["method"] == "esd"]
    same = [row for seed, case in erased for row in seeds[seed] if row["method"] == "edit" and row["case"] == case]
    for rate in dict.fromkeys(row["rate"] for row in trained):
        label = f"a digit a seed: ESD-x, 1000 steps at {rate:g}"
        rows.append(line(label, [row for row in trained if row["rate"] == rate]))
    if trained:
        rows.append(line("a digit a seed: **edit_concept**", same))
    for digit in (digit for digit in DIGITS if of("edit", (digit,))):
        anchor = next(row["anchors"][digit] for row in runs if row["case"] == digit)
        rows.append(line(f"{digit} -> {anchor}", of("edit", (digit,))))
    told = {"target": "target still read,", "others": "others right,", "drift": "picture drift,"}
    words = [name.split() for name in names]
    head = [" ".join([told[first], *rest]) for first, *rest in words]
    return table(["", *head, "CPU seconds"], rows)


def main(input_args: list[str] | None = None) -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trained_seeds", type=int, default=5, help="of these, the first that ESD-x is trained in")
    parser.add_argument("--pictures", type=int, default=50, help="per group of prompts")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default=str(MODEL_DIR), help="a folder of the digits")
    names = tuple(dict.fromkeys(case.name for case in CASES))
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help="[all]")
    parser.add_argument("--name", help="of the results [editing_on_ and the model's]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="[all; SPEED and ESD-x are those of UNets]")
    args = parser.parse_args(input_args)
    is_unet = (Path(args.model) / "unet").is_dir()
    methods = args.methods or [method for method in METHODS if is_unet or method not in ("speed", "esd")]
    if "edit" not in methods:
        raise ValueError(f"`--methods` must hold edit, whose anchors all of them take, got {methods}.")
    pool = ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        settings = (
            [value] * args.seeds for value in (args.pictures, args.model, methods, args.trained_seeds, args.cases)
        )
        results = pool.map(run_seed, range(args.seeds), *settings)
        seeds = list(tqdm(results, total=args.seeds, desc="seeds"))
    text = summarize(seeds)
    name = args.name or f"editing_on_{Path(args.model).resolve().parent.name}"
    write_results(name, {"pictures": args.pictures, "seeds": seeds}, text)
    print(text)


if __name__ == "__main__":
    main()

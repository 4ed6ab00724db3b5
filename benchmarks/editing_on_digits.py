"""Concepts of the digits model edited in closed form, against Unified Concept Editing and a negative prompt.

python benchmarks/editing_on_digits.py --seeds 5
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.baselines.uce import unified_concept_edit
from benchmarks.machine import table, write_results
from diffusers_ext.nullspace.edit import edit_concept
from examples.digits.check_model import draw, load_pipeline
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
    """One row of the table."""

    name: str
    targets: tuple[str, ...]
    method: str  # "edit", "one by one", "uce" or "negative prompt"


CASES = [
    *(Case(digit, (digit,), "edit") for digit in DIGITS),
    *(Case(color, (color,), "edit") for color in ("red", "blue")),
    Case("five at once", FIVE, "edit"),
    Case("five one by one", FIVE, "one by one"),
    *(Case(digit, (digit,), "uce") for digit in DIGITS),
    *(Case(digit, (digit,), "negative prompt") for digit in DIGITS),
]


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


def measure(pipeline: Any, judge: DigitsJudge, case: Case, seed: int, count: int, **call: Any) -> Shares:
    """Share of pictures that still show the target, or that show what the other prompts ask for."""
    shares = {}
    for name, prompts in groups(case.targets, seed, count).items():
        reading = judge.read(draw(pipeline, prompts, seed=10_000 * (seed + 1), description=name, **call))
        right = []
        for prompt, digit, color in zip(prompts, reading.names, reading.colors):
            asked_color, asked_digit = read_prompt(prompt)
            shown = {digit, color}
            if name.startswith("target"):
                right.append({asked_color, asked_digit} & {*case.targets} <= shown)
            else:
                right.append(digit == asked_digit and color == asked_color)
        shares[name] = float(np.mean(right))
    return shares


def names_of(targets: Sequence[str]) -> list[str]:
    """The concepts to preserve, by their bare names."""
    return [word for word in (*DIGITS, *COLORS) if word not in targets]


def edit(pipeline: Any, case: Case) -> tuple[float, dict[str, str]]:
    """Put a case's edit into the model; returns seconds, and what stands for what."""
    started, anchors = time.perf_counter(), {}
    if case.method == "one by one":
        for target in case.targets:
            result = edit_concept(pipeline, {target: None}, knowledge_prompts())
            pipeline.load_lora_weights(result.lora)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            anchors |= result.told
    elif case.method == "edit":
        result = edit_concept(pipeline, dict.fromkeys(case.targets), knowledge_prompts())
        anchors = result.told
        pipeline.load_lora_weights(result.lora)
    elif case.method == "uce":
        anchors = edit_concept(pipeline, {case.targets[0]: None}, knowledge_prompts()).told
        started = time.perf_counter()
        pipeline.load_lora_weights(unified_concept_edit(pipeline, anchors, names_of(case.targets)))
    return time.perf_counter() - started, anchors


def run_seed(seed: int, count: int) -> list[dict[str, Any]]:
    """All cases of one seed, and the base model on the same prompts."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    judge, rows = DigitsJudge(), []
    for case in CASES:
        pipeline = load_pipeline()
        row: dict[str, Any] = {"case": case.name, "method": case.method}
        if case.method in ("edit", "one by one"):
            row["base"] = measure(pipeline, judge, case, seed, count)
        row["seconds"], row["anchors"] = edit(pipeline, case)
        call = {}
        if case.method == "negative prompt":
            call["negative_prompt"] = case.targets[0]
        row["edited"] = measure(pipeline, judge, case, seed, count, **call)
        rows.append(row)
    return rows


def summarize(seeds: list[list[dict[str, Any]]]) -> str:
    """The table: mean over seeds, the worst in brackets."""
    names = list(seeds[0][0]["edited"])
    rows = []

    def line(label: str, runs: list[Shares], seconds: list[float] | None = None) -> list[str]:
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            worst = max(values) if name.startswith("target") else min(values)
            cells.append(f"{np.mean(values):.3f} ({worst:.3f})")
        return [label, *cells, "-" if seconds is None else f"{np.median(seconds):.1f}"]

    runs = [row for rows_of_seed in seeds for row in rows_of_seed]

    def of(method: str, cases: Sequence[str], side: str = "edited") -> tuple[list[Shares], list[float]]:
        found = [row for row in runs if row["method"] == method and row["case"] in cases]
        return [row[side] for row in found], [row["seconds"] for row in found]

    rows.append(line("base, all digits", of("edit", DIGITS, "base")[0]))
    rows.append(line("**edit_concept**, each of ten digits", *of("edit", DIGITS)))
    rows.append(line("UCE, each of ten digits", *of("uce", DIGITS)))
    rows.append(line("negative prompt, each of ten digits", of("negative prompt", DIGITS)[0]))
    for label, method, cases in (
        ("edit_concept, red and blue", "edit", ("red", "blue")),
        ("edit_concept, five digits at once", "edit", ("five at once",)),
        ("edit_concept, five one by one", "one by one", ("five one by one",)),
    ):
        rows.append(line(label, *of(method, cases)))
        rows.append(line("the same, base", of(method, cases, "base")[0]))
    for digit in DIGITS:
        anchor = next(row["anchors"][digit] for row in runs if row["case"] == digit)
        rows.append(line(f"{digit} -> {anchor}", *of("edit", (digit,))))
    head = ["", *(name.replace("target", "target still read,") for name in names), "seconds"]
    return table([cell.replace("others", "others right,") for cell in head], rows)


def main(input_args: list[str] | None = None) -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=50, help="per group of prompts")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    pool = ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        results = pool.map(run_seed, range(args.seeds), [args.pictures] * args.seeds)
        seeds = list(tqdm(results, total=args.seeds, desc="seeds"))
    text = summarize(seeds)
    write_results("editing_on_digits", {"pictures": args.pictures, "seeds": seeds}, text)
    print(text)


if __name__ == "__main__":
    main()

"""Erasure against what else changes, over each method's own dial: edits of the digits model, UCE and SPEED.

python benchmarks/strength_of_edits_on_digits.py --seeds 2
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.baselines.speed import speed
from benchmarks.baselines.uce import unified_concept_edit
from benchmarks.editing_on_digits import LABELS, SOME_DIGITS, Examiner, names_of
from benchmarks.machine import table, write_results
from diffusers_ext.nullspace.edit import edit_concept
from examples.digits.check_model import MODEL_DIR, load_pipeline
from examples.digits.subjects import knowledge_prompts

# The stronger, the more is kept, except for SPEED's, below which energies count as free.
DIALS = {
    "edit": ("`preserve_weight`", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)),
    "uce": ("lambda", (0.005, 0.05, 0.5, 5.0, 50.0, 500.0)),
    "speed": ("threshold", (0.01, 0.1, 1.0, 10.0)),
}
Row = dict[str, Any]


def run_seed(seed: int, count: int) -> list[Row]:
    """Every setting of every method on three digits."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    examiner, rows, known = Examiner(seed, count, str(MODEL_DIR)), [], knowledge_prompts()
    for digit in SOME_DIGITS:
        anchors = edit_concept(load_pipeline(), {digit: None}, known).told
        for method, (_, values) in DIALS.items():
            for value in values:
                pipeline = load_pipeline()
                if method == "edit":
                    lora = edit_concept(pipeline, anchors, known, preserve_weight=value).lora
                elif method == "uce":
                    lora = unified_concept_edit(pipeline, anchors, names_of([digit]), weight=value)
                else:
                    lora = speed(pipeline, anchors, names_of([digit]), threshold=value)
                pipeline.load_lora_weights(lora)
                _, edited = examiner.examine(pipeline, (digit,))
                rows.append({"digit": digit, "method": method, "value": value, "edited": edited})
    return rows


def summarize(rows: list[Row]) -> str:
    """A line per setting, means over digits and seeds."""
    names = list(rows[0]["edited"])
    lines = []
    for method, (dial, values) in DIALS.items():
        for value in values:
            found = [row["edited"] for row in rows if (row["method"], row["value"]) == (method, value)]
            means = [np.mean([shares[name] for shares in found]) for name in names]
            cells = [f"{mean:.{4 if name.startswith('drift') else 3}f}" for name, mean in zip(names, means)]
            lines.append([f"{LABELS[method]}, {dial} {value:g}", *cells])
    told = {"target": "target still read,", "others": "others right,", "drift": "picture drift,"}
    head = [" ".join([told[first], *rest]) for first, *rest in map(str.split, names)]
    return table(["", *head], lines)


def main(input_args: list[str] | None = None) -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=25, help="per group of prompts")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    pool = ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        results = pool.map(run_seed, range(args.seeds), [args.pictures] * args.seeds)
        rows = [row for found in tqdm(results, total=args.seeds, desc="seeds") for row in found]
    text = summarize(rows)
    write_results("strength_of_edits_on_digits", {"pictures": args.pictures, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()

"""What an edit's report says of preserved concepts and of its targets, against what the digits model then draws.

python benchmarks/near_concepts_on_digits.py

Digits are edited with weights of what is preserved from far too small to far too large, so that neighbours are lost
at one end and targets stay at the other. The thresholds of `nullspace/edit_report.py` stand where that begins.
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

from benchmarks.machine import table, write_results
from diffusers_ext.nullspace.edit import edit_concept
from examples.digits.check_model import draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import DIGITS, TEMPLATES, TRAINING_PAIRS, prompt_pairs
from examples.digits.subjects import knowledge_prompts

EDITS = {"three": "six", "seven": "four", "eight": "nine", "one": "two", "five": "seven", "zero": "nine"}
WEIGHTS = (1e-5, 1e-3, 1e-2, 1.0, 100.0, 1e3, 1e4, 1e5)
BINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, np.inf)
ACHIEVED_BINS = (-np.inf, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.01)


def share_read(pipeline: Any, judge: DigitsJudge, digit: str, count: int) -> float:
    """Share of pictures for a digit's prompts that show it."""
    pairs = tuple(pair for pair in TRAINING_PAIRS if pair[1] == digit)
    prompts = [prompt for template in TEMPLATES for prompt in prompt_pairs(template, pairs)]
    prompts = [prompts[i] for i in np.random.default_rng(0).choice(len(prompts), count)]
    pictures = draw(pipeline, prompts, seed=77, num_inference_steps=10, description=digit)
    return float(np.mean([name == digit for name in judge.read(pictures).names]))


def run_edit(target: str, count: int) -> list[dict[str, Any]]:
    """All weights of one edit: what is said of it, and shares of pictures that show what is asked for."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pipeline, judge, rows = load_pipeline(), DigitsJudge(), []
    for weight in WEIGHTS:
        edit = edit_concept(pipeline, {target: EDITS[target]}, knowledge_prompts(), preserve_weight=weight)
        pipeline.load_lora_weights(edit.lora)
        (said,) = edit.report.concepts
        near = (
            {digit: share_read(pipeline, judge, digit, count) for digit in said["neighbours"] if digit in DIGITS}
            if weight <= 1
            else {}
        )
        still = share_read(pipeline, judge, target, count)
        pipeline.unload_lora_weights()
        rows.append({"target": target, "preserve_weight": weight, **said, "read": near, "target_read": still})
    return rows


def summarize(rows: list[dict[str, Any]]) -> str:
    """Two tables: neighbours by how far they move, and targets by how much of the edit is achieved."""
    moved = [(row["neighbours"][d], share) for row in rows for d, share in row["read"].items()]
    achieved = [(row["achieved"], row["target_read"]) for row in rows]
    parts = []
    for head, pairs, bins in (
        (["neighbour moves by", "neighbours", "still read, mean", "worst"], moved, BINS),
        (["share of the edit achieved", "edits", "target still read, mean", "most"], achieved, ACHIEVED_BINS),
    ):
        lines = []
        for low, high in zip(bins, bins[1:]):
            reads = [read for value, read in pairs if low <= value < high]
            if reads:
                worst = min(reads) if pairs is moved else max(reads)
                lines.append([f"{low:g} to {high:g}", str(len(reads)), f"{np.mean(reads):.2f}", f"{worst:.2f}"])
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def main(input_args: list[str] | None = None) -> None:
    """Run all edits and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=20, help="of each digit and edit")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(input_args)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(run_edit, EDITS, [args.pictures] * len(EDITS))
        rows = [row for found in tqdm(results, total=len(EDITS), desc="edits") for row in found]
    text = summarize(rows)
    write_results("near_concepts_on_digits", {"pictures": args.pictures, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()

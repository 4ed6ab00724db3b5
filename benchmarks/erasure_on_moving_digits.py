"""Erase digits and a colour of the moving-digits model, read what is left, try to bring it back.

python benchmarks/erasure_on_moving_digits.py --work_dir outputs/erasure

Everything made is kept in the work folder, and found there by the next call: several processes can share the work,
each with its own `--targets`, and a last one with all of them writes the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.document_training import train_document_eraser
from benchmarks.erasure_tables import erasure_tables
from benchmarks.machine import write_results
from benchmarks.revival_of_digits import measure_revival
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.eraser.files import load_eraser, save_eraser
from diffusers_ext.evaluation.erasure_report import ErasureReport
from examples.digits.prompts import DIGITS
from examples.moving_digits.check_model import draw, load_pipeline
from examples.moving_digits.erasers import RECIPE, base_clips_of, evaluate, evaluation_groups, train_digits_eraser
from examples.moving_digits.prompts import NEUTRAL_COLOR, NEUTRAL_DIGIT

TARGETS = ("three", "seven", "eight", "red")
_SCALES = (0.5, 1.3)
_DEFENDED = replace(RECIPE, adversarial_share=0.5, adversarial_every=25)


class Bench:
    """The work folder of a run."""

    def __init__(self, folder: Path, seeds: int) -> None:
        self.folder, self.seeds = folder, seeds
        folder.mkdir(parents=True, exist_ok=True)

    def base_clips(self, name: str, groups: dict[str, list[str]]) -> np.ndarray:
        """Clips without erasers, drawn once."""
        path = self.folder / f"base_{name}.npy"
        if not path.is_file():
            partial = path.with_suffix(".partial.npy")
            np.save(partial, base_clips_of(load_pipeline(), groups))
            partial.replace(path)
        return np.load(path)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, kept in `<name>.json`."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_atomically(path, json.dumps(make()) + "\n")
        return json.loads(path.read_text())

    def eraser(self, target: str, seed: int) -> Path:
        """An eraser of the fixed recipe, trained unless it is there."""
        folder = self.folder / f"eraser_{target}_{seed}"
        if not folder.is_dir():
            pipeline, began = load_pipeline(), time.perf_counter()
            trained = train_digits_eraser(pipeline, target, seed=seed)
            facts = {"seconds": time.perf_counter() - began, "history": trained.history}
            write_atomically(self.folder / f"training_{target}_{seed}.json", json.dumps(facts))
            save_eraser(pipeline, folder)
        return folder

    def figures(self, report: ErasureReport) -> dict[str, Any]:
        """What is kept of a report."""
        settings = {**report.settings, "base": "examples/moving_digits/model"}  # no machine's path
        return {"groups": report.groups, "settings": settings}

    def evaluate_eraser(self, target: str, seed: int) -> dict[str, Any]:
        """Figures of one eraser."""
        groups, pipeline = evaluation_groups(target), load_pipeline()
        load_eraser(pipeline, self.eraser(target, seed))
        clips = self.base_clips(target, groups)
        report = evaluate(pipeline, target, groups, base_clips=clips)
        if seed == 0:
            report.save(self.folder / f"report_{target}")
        return self.figures(report)

    def evaluate_scales(self, target: str) -> dict[str, Any]:
        """Figures of the first eraser at other strengths; at none, whether clips are the base's to the bit."""
        groups = evaluation_groups(target, num_target=100, num_preserved=180, num_robust=40)
        pipeline = load_pipeline()
        load_eraser(pipeline, self.eraser(target, 0))
        clips = self.base_clips(f"{target}_fewer", groups)
        found = self.figures(evaluate(pipeline, target, groups, base_clips=clips, scales=_SCALES))
        prompts = groups["target"][:20]
        plain = draw(load_pipeline(), prompts, seed=0)
        pipeline.transformer.set_adapters(["default"], [0.0])
        return {**found, "scale 0 is the base": bool((draw(pipeline, prompts, seed=0) == plain).all())}

    def evaluate_document(self, target: str) -> dict[str, Any]:
        """Figures of the design document's recipe."""
        groups, pipeline = evaluation_groups(target), load_pipeline()
        seconds = train_document_eraser(pipeline, target)
        report = evaluate(pipeline, target, groups, base_clips=self.base_clips(target, groups))
        return {**self.figures(report), "seconds": seconds}

    def evaluate_neutral(self, target: str) -> dict[str, Any]:
        """Figures of the recipe with a neutral word as anchor."""
        groups, pipeline = evaluation_groups(target), load_pipeline()
        neutral = NEUTRAL_DIGIT if target in DIGITS else NEUTRAL_COLOR
        train_digits_eraser(pipeline, target, anchor_concept=neutral)
        clips = self.base_clips(target, groups)
        return self.figures(evaluate(pipeline, target, groups, base_clips=clips))

    def evaluate_defended(self, target: str) -> dict[str, Any]:
        """Figures of an eraser that was trained against learned embeddings, and attempts to undo it."""
        groups, pipeline = evaluation_groups(target), load_pipeline()
        train_digits_eraser(pipeline, target, recipe=_DEFENDED)
        folder = self.folder / f"eraser_{target}_defended"
        save_eraser(pipeline, folder)
        clips = self.base_clips(target, groups)
        found = self.figures(evaluate(pipeline, target, groups, base_clips=clips))
        return {**found, "revival": measure_revival(folder, target)}

    def evaluate_pair(self, first: str, second: str) -> dict[str, Any]:
        """Two erasers at once."""
        single = [evaluation_groups(word, num_preserved=240) for word in (first, second)]
        others = [p for p in single[0]["preserved"] if f" {second}" not in f" {p}"]
        groups = {"target": single[0]["target"][::2], "preserved": others, "second target": single[1]["target"][::2]}
        pipeline = load_pipeline()
        for word in (first, second):
            load_eraser(pipeline, self.eraser(word, 0), adapter_name=word)
        pipeline.transformer.set_adapters([first, second])
        clips = self.base_clips(f"{first}_{second}", groups)
        return self.figures(evaluate(pipeline, first, groups, base_clips=clips))

    def run_target(self, target: str, parts: list[str]) -> None:
        """All work on one target."""
        if "erasers" in parts:
            for seed in range(self.seeds):
                self.once(f"{target}_{seed}", lambda s=seed: self.evaluate_eraser(target, s))
            self.once(f"{target}_scales", lambda: self.evaluate_scales(target))
        if "document" in parts:
            self.once(f"{target}_document", lambda: self.evaluate_document(target))
        if "neutral" in parts:
            self.once(f"{target}_neutral", lambda: self.evaluate_neutral(target))
        if "defended" in parts:
            self.once(f"{target}_defended", lambda: self.evaluate_defended(target))
        if "revival" in parts and target in DIGITS:
            folder = self.eraser(target, 0)
            self.once(f"{target}_revival", lambda: measure_revival(folder, target))

    def run_pairs(self, targets: list[str]) -> None:
        """All pairs of digits."""
        digits = [target for target in targets if target in DIGITS]
        for i, first in enumerate(digits):
            for second in digits[i + 1 :]:
                self.once(f"pair_{first}_{second}", lambda a=first, b=second: self.evaluate_pair(a, b))


def main(input_args: list[str] | None = None) -> None:
    """Train, evaluate, and write tables once everything is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/erasure"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parts = ["erasers", "document", "neutral", "revival", "defended", "pairs", "table"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    bench = Bench(args.work_dir, args.seeds)
    for target in args.targets:
        bench.run_target(target, args.parts)
    if "pairs" in args.parts:
        bench.run_pairs(args.targets)
    if "table" in args.parts:
        results = {path.stem: json.loads(path.read_text()) for path in args.work_dir.glob("*.json")}
        results = {name: run for name, run in results.items() if not name.startswith("training_")}
        text = erasure_tables(results, args.targets, args.seeds)
        write_results("erasure_on_moving_digits", {"recipe": asdict(RECIPE), "runs": results}, text)
        print(text)


if __name__ == "__main__":
    main()

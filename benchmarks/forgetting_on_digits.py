"""What the digits model keeps after learning a glyph: plain LoRA and others against null-space LoRA, five seeds.

python benchmarks/forgetting_on_digits.py --seeds 5
python benchmarks/forgetting_on_digits.py --model examples/digits_flux2/model --columns plain null-space
python benchmarks/forgetting_on_digits.py --work_dir outputs/forgetting  # goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.baselines.finetuning import ADAPTERS, drawn_latents, finetune
from benchmarks.machine import table, write_results
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.evaluation.forgetting import evaluate_forgetting
from diffusers_ext.training.nullspace.data import encode_conditions, encode_images, list_images
from examples.digits.check_model import MODEL_DIR, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.subjects import (
    DIGITS_FLAGS,
    FLUX2_FLAGS,
    INSTANCE_PROMPTS,
    NULL_SPACE_FLAGS,
    PLAIN_FLAGS,
    SubjectFlags,
    glyph_share,
    held_out_prompts,
    knowledge_prompts,
    load_with_loras,
    train_subject,
    write_subject,
)

PLAIN_RATES = ("1e-3", "3e-3", "1e-2")
# Each of the others learns at three rates on the first seed, and at the best of them on the rest.
OTHER_RATES = {
    "prior preservation": PLAIN_RATES,
    "output preservation (DOP)": PLAIN_RATES,
    "MiCA": ("1e-2", "3e-2", "1e-1"),
    "OFT": ("3e-4", "1e-3", "3e-3"),
    "OSF": ("3e-4", "1e-3", "3e-3"),
}
GLYPHS = tuple(INSTANCE_PROMPTS)
COLUMNS = {
    "plain": "plain LoRA (best of 3 rates)",
    "null-space": "null-space LoRA",
    "defaults": "null-space LoRA, the script's defaults",
    "three": "three null-space LoRAs at once",
}
Figures = dict[str, Any]


class Examiner:
    """Measures LoRAs on the digits model: new glyphs, preserved and held-out prompts."""

    def __init__(self, pictures: int, model: str = str(MODEL_DIR)) -> None:
        self.base, self.pictures = load_pipeline(model), pictures
        self.judge, self.glyph_judge = DigitsJudge(), DigitsJudge(glyphs=True)

    def examine(self, tuned: DiffusionPipeline, glyphs: list[str], seed: int) -> Figures:
        """Glyph shares, reading shares of base and tuned, and pixel drift."""
        shares = {glyph: self._glyph(tuned, glyph, seed) for glyph in glyphs}
        report = evaluate_forgetting(
            self.base,
            tuned,
            knowledge_prompts()[seed % 2 :: 2],  # every prompt is asked in every second seed
            held_out_prompts=held_out_prompts()[seed % 2 :: 2],
            judge=self.judge.correct,
            num_images_per_prompt=1,
            seed=seed,
            num_inference_steps=20,
            guidance_scale=3.0,
            batch_size=50,
        )
        return {"glyphs": shares, "groups": report.summary}

    def _glyph(self, tuned: DiffusionPipeline, glyph: str, seed: int) -> float:
        first = 50_000 + 1_000 * seed
        return glyph_share(tuned, glyph, self.glyph_judge, count=self.pictures, seed=first)[0]


def flags_of(model: str) -> SubjectFlags:
    """How the benchmark teaches a model."""
    return DIGITS_FLAGS if (Path(model) / "unet").is_dir() else FLUX2_FLAGS


def measured_once(folder: Path, measure: Callable[..., Figures], *arguments: Any) -> Figures:
    """What `measure` finds, from its file where an earlier run wrote one to the folder."""
    path = folder / "figures.json"
    if not path.is_file():
        figures = measure(*arguments)
        write_atomically(path, json.dumps(figures))
    return json.loads(path.read_text())


def run_seed(seed: int, folder: Path, pictures: int, model: str, asked: list[str]) -> dict[str, Figures]:
    """All trainings and measurements of one seed; the glyph of the single runs goes round."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    examiner, flags = Examiner(pictures, model), flags_of(model)
    glyph = GLYPHS[seed % len(GLYPHS)]

    def learn(name: str, own: dict[str, tuple[str, ...]], common: tuple[str, ...] = flags.common) -> Figures:
        """Figures of the LoRAs of some glyphs at once, by the flags of each."""
        work = folder / name.replace(" ", "_")
        loras = [
            train_subject(work, glyph, glyph, of_glyph, seed=seed, model=model, common=common)
            for glyph, of_glyph in own.items()
        ]
        return examiner.examine(load_with_loras(loras, model), list(own), seed)

    def reserved(glyph: str) -> list[str]:
        others = [prompt for other, prompt in INSTANCE_PROMPTS.items() if other != glyph]
        return [text for prompt in others for text in ("--other_instance_prompts", prompt)]

    plain = {f"plain {rate}": (*flags.plain, "--learning_rate", rate) for rate in PLAIN_RATES}
    columns = {name: (learn, name, {glyph: own}) for name, own in plain.items()}
    columns["null-space"] = (learn, "null-space", {glyph: flags.null_space})
    columns["defaults"] = (learn, "defaults", {glyph: ()}, ())
    three = {name: (*flags.null_space, *reserved(name)) for name in GLYPHS}
    columns["three"] = (learn, "three", three)
    return {
        name: measured_once(folder / name.replace(" ", "_"), *how)
        for name, how in columns.items()
        if name.split()[0] in asked
    }


def run_other(method: str, rate: str, seed: int, folder: Path, pictures: int) -> Figures:
    """Train by one of the other methods, on the glyph of the seed, and measure."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    glyph, name = GLYPHS[seed % len(GLYPHS)], f"{method}_{rate}_{seed}"
    if method == "prior preservation":
        prior = ("--with_prior_preservation", "--class_prompt", "a photo of a digit", "--num_inference_steps", "20")
        flags = (*PLAIN_FLAGS, "--learning_rate", rate, *prior, "--class_data_dir", str(folder / f"{name}_class"))
        tuned = load_with_loras([train_subject(folder, name, glyph, flags, seed=seed)])
    else:
        tuned, preserved, known = load_pipeline(), None, knowledge_prompts()
        subject = list_images(write_subject(folder / f"{name}_pictures", glyph, seed=seed + 1))
        images = encode_images(tuned, subject, 32, center_crop=True, flip=False)
        if method not in ADAPTERS:
            preserved = drawn_latents(tuned, known, 90_000 + seed), encode_conditions(tuned, known)
        adapter = ADAPTERS["LoRA" if preserved else method]()
        finetune(tuned, adapter, images, INSTANCE_PROMPTS[glyph], float(rate), preserved=preserved, seed=seed)
    return Examiner(pictures).examine(tuned, [glyph], seed)


def figures_of(result: Figures) -> dict[str, float]:
    """The numbers of one measurement that the table shows."""
    preserved, held_out = result["groups"]["preserved"], result["groups"]["held_out"]
    return {
        "glyph": min(result["glyphs"].values()),
        "preserved": preserved["accuracy_tuned"],
        "preserved_base": preserved["accuracy_base"],
        "held_out": held_out["accuracy_tuned"],
        "held_out_base": held_out["accuracy_base"],
        "drift": preserved["pixel_drift"],
    }


def merit(figures: dict[str, float]) -> tuple[float, float]:
    """What decides between rates: the glyph share; among equals the least drift."""
    return figures["glyph"], -figures["drift"]


def best_plain(results: dict[str, Figures]) -> Figures:
    """The plain run of the best rate."""
    return max((figures_of(results[f"plain {rate}"]) for rate in PLAIN_RATES), key=merit)


def run_others(pool: ProcessPoolExecutor, seeds: int, folder: Path, pictures: int) -> dict[str, dict[str, Any]]:
    """`{method: a run per seed}`, with the rate that the first seed has found best."""

    def start(method: str, rate: str, seed: int) -> Any:
        own = folder / f"{method}_{rate}_{seed}"
        return pool.submit(measured_once, own, run_other, method, rate, seed, own, pictures)

    first = {(method, rate): start(method, rate, 0) for method, rates in OTHER_RATES.items() for rate in rates}
    runs, rest = {}, {}
    for method, rates in OTHER_RATES.items():
        tried = {rate: figures_of(first[method, rate].result()) for rate in rates}
        best = max(tried, key=lambda rate: merit(tried[rate]))
        rest[method] = [start(method, best, seed) for seed in range(1, seeds)]
        runs[method] = {"rate": best, "tried": tried, "runs": [tried[best]]}
    for method, waiting in rest.items():
        runs[method]["runs"] += [figures_of(run.result()) for run in waiting]
    return runs


def table_of_others(others: dict[str, dict[str, Any]], summary: dict[str, Figures]) -> str:
    """A row per method, the null-space LoRA's last; the rate of each was chosen on the first seed."""
    labels = ("method", "rate, best of 3 on the first seed", "new glyph", "old digits", "held-out", "drift")
    keys = ("glyph", "preserved", "held_out", "drift")
    rows = []
    for method, run in others.items():
        values = {key: [figures[key] for figures in run["runs"]] for key in keys}
        worst = {key: (max if key == "drift" else min)(found) for key, found in values.items()}
        rows.append([method, run["rate"], *(f"{np.mean(values[key]):.4f} ({worst[key]:.4f})" for key in keys)])
    ours = summary["null-space LoRA"]
    cells = (f"{ours[k]['mean']:.4f} ({(max if k == 'drift' else min)(ours[k]['runs']):.4f})" for k in keys)
    rows.append(["**null-space LoRA**", NULL_SPACE_FLAGS[-1], *cells])
    return table(list(labels), rows)


def summarize(seeds: list[dict[str, Figures]]) -> tuple[dict[str, Figures], str]:
    """Mean and worst of every figure over the seeds, and the table."""
    measured = [name for name in COLUMNS if any(found.split()[0] == name for found in seeds[0])]
    columns = {
        COLUMNS[name]: [best_plain(found) if name == "plain" else figures_of(found[name]) for found in seeds]
        for name in measured
    }
    summary = {
        name: {
            key: {"mean": float(np.mean([f[key] for f in runs])), "runs": [f[key] for f in runs]} for key in runs[0]
        }
        for name, runs in columns.items()
    }
    labels = {
        "glyph": "new glyph read as itself (worst glyph)",
        "preserved": "old digits, preserved prompts",
        "preserved_base": "the same, base model",
        "held_out": "old digits, held-out pairs and template",
        "held_out_base": "the same, base model",
        "drift": "pixel drift, preserved prompts",
    }
    rows = []
    for key, label in labels.items():
        worst = max if key == "drift" else min
        cells = [summary[name][key] for name in columns]
        rows.append([label] + [f"{c['mean']:.4f} ({worst(c['runs']):.4f})" for c in cells])
    return summary, table(["mean (worst) of the seeds", *columns], rows)


def main(input_args: list[str] | None = None) -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=100, help="per new glyph")
    parser.add_argument("--model", default=str(MODEL_DIR), help="a folder of the digits")
    parser.add_argument("--name", help="[forgetting_on_ and the model's]")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="at once; each one has its share of the cores as threads [one a core]",
    )
    parser.add_argument("--columns", nargs="+", choices=(*COLUMNS, "others"), help="[all; others are those of UNets]")
    parser.add_argument("--work_dir", help="keeps what is finished, of the same settings [a temporary folder]")
    args = parser.parse_args(input_args)
    is_unet = flags_of(args.model) is DIGITS_FLAGS
    asked = args.columns or [*COLUMNS, *(["others"] if is_unet else [])]
    if "null-space" not in asked or "others" in asked and not is_unet:
        raise ValueError(f"`--columns` must hold null-space, and others with a UNet only, got {asked}.")
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    pool = ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))
    with tempfile.TemporaryDirectory() as temporary, pool:
        folder = args.work_dir or temporary
        work = [Path(folder, str(seed)) for seed in range(args.seeds)]
        settings = ([value] * args.seeds for value in (args.pictures, args.model, asked))
        results = pool.map(run_seed, range(args.seeds), work, *settings)
        others = run_others(pool, args.seeds, Path(folder, "others"), args.pictures) if "others" in asked else {}
        seeds = list(tqdm(results, total=args.seeds, desc="seeds"))
    summary, text = summarize(seeds)
    if others:
        text += "\n\n" + table_of_others(others, summary)
    flags = flags_of(args.model)._asdict()
    write_results(
        args.name or f"forgetting_on_{Path(args.model).resolve().parent.name}",
        {"flags": flags, "summary": summary, "seeds": seeds, "others": others},
        text,
    )
    print(text)


if __name__ == "__main__":
    main()

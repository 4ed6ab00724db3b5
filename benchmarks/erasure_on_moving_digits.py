"""Erase digits and a colour of the moving-digits model, read what is left, try to bring it back.

python benchmarks/erasure_on_moving_digits.py
python benchmarks/erasure_on_moving_digits.py --model examples/moving_digits_wan/model --parts erasers table
python benchmarks/erasure_on_moving_digits.py --parts methods table --methods negative nag safree --targets seven

Everything made is kept in the work folder, and found there by the next call, so that a run may be stopped, and parts
of it may be run apart: by `--parts`, `--methods`, `--targets` and `--seeds`. The tables show whatever is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.erasure_methods import (
    ERASER,
    ESD,
    ESD_RATES,
    METHODS,
    TRAINED,
    Armed,
    arm,
    attack_method,
    cost_of_method,
    judge_method,
)  # fmt: skip
from benchmarks.erasure_tables import erasure_tables
from benchmarks.machine import write_results
from benchmarks.revival_of_digits import attack_points, measure_revival
from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.eraser.files import load_eraser, save_eraser
from diffusers_ext.evaluation.erasure_report import ErasureReport
from examples.digits.prompts import DIGITS
from examples.moving_digits.check_model import MODEL_DIR, draw, load_pipeline, spread
from examples.moving_digits.erasers import (
    base_clips_of,
    evaluate,
    evaluation_groups,
    recipe_of,
    train_digits_eraser,
)  # fmt: skip
from examples.moving_digits.prompts import NEUTRAL_COLOR, NEUTRAL_DIGIT, write_prompts

TARGETS = ("three", "seven", "eight", "red")
PARTS = (
    "erasers", "methods", "attacks", "long_attacks", "costs", "document", "neutral", "revival", "defended", "pairs",
    "stack", "table",
)  # fmt: skip
# Of every method, target and seed: part, name of the files, work.
_OF_METHODS = (
    ("methods", "method", "evaluate_method"),
    ("attacks", "attacked", "attack"),
    ("long_attacks", "long-attacked", "long_attack"),
)
_SCALES = (0.5, 1.3)
_DEFENCE = {"adversarial_share": 0.5, "adversarial_every": 25}
_USUAL_CLIPS = 200
Groups = dict[str, list[str]]


class Task(NamedTuple):
    """One file of the results, or of what they need: a method of `Bench` and its arguments."""

    name: str
    work: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Bench:
    """The work folder of a run on one model.

    Args:
        num_clips: of each target; those of other groups are in proportion.
    """

    folder: Path
    model: str
    num_clips: int = _USUAL_CLIPS

    @property
    def name(self) -> str:
        """Of the example that the model is of."""
        return Path(self.model).resolve().parent.name

    def load(self) -> Any:
        """A fresh pipeline."""
        return load_pipeline(self.model)

    def groups(self, target: str, **counts: int) -> Groups:
        """Prompts of a target and of the rest."""
        counts = {"num_target": 200, "num_preserved": 360, "num_robust": 100, **counts}
        return evaluation_groups(
            target, **{name: max(2, count * self.num_clips // _USUAL_CLIPS) for name, count in counts.items()}
        )

    def base_clips(self, name: str, groups: Groups) -> np.ndarray:
        """Clips without erasers, drawn once."""
        path = self.folder / f"base_{name}_{sum(map(len, groups.values()))}.npy"
        if not path.is_file():
            partial = path.with_suffix(f".{multiprocessing.current_process().pid}.npy")
            np.save(partial, base_clips_of(self.load(), groups))
            partial.replace(path)
        return np.load(path)

    def once(self, task: Task) -> None:
        """What a task gives, kept in `<name>.json`."""
        path = self.folder / f"{task.name}.json"
        if not path.is_file():
            write_atomically(path, json.dumps(getattr(self, task.work)(*task.arguments)) + "\n")

    def eraser(self, target: str, seed: int) -> Path:
        """An eraser of the fixed recipe, trained unless it is there."""
        self.arm(ERASER, target, seed)
        return self.folder / f"{ERASER}_{target}_{seed}"

    def arm(self, method: str, target: str, seed: int) -> Armed:
        """A method in a fresh pipeline; what is trained is kept in the work folder."""
        return arm(method, target, seed, self.model, self.folder)

    def figures(self, report: ErasureReport) -> dict[str, Any]:
        """What is kept of a report."""
        settings = {**report.settings, "base": self.name}  # no machine's path
        return {"groups": report.groups, "settings": settings}

    def judged(self, pipeline: Any, target: str, **options: Any) -> ErasureReport:
        """Figures of the erasers in a pipeline on the usual prompts."""
        groups = self.groups(target)
        return evaluate(pipeline, target, groups, base_clips=self.base_clips(target, groups), **options)

    def evaluate_scales(self, target: str) -> dict[str, Any]:
        """Figures of the first eraser at other strengths; at none, whether clips are the base's to the bit."""
        groups = self.groups(target, num_target=100, num_preserved=180, num_robust=40)
        pipeline = self.load()
        load_eraser(pipeline, self.eraser(target, 0))
        clips = self.base_clips(f"{target}_fewer", groups)
        found = self.figures(evaluate(pipeline, target, groups, base_clips=clips, scales=_SCALES))
        prompts = groups["target"][:20]
        plain = draw(self.load(), prompts, seed=0)
        pipeline.transformer.set_adapters(["default"], [0.0])
        return {**found, "scale 0 is the base": bool((draw(pipeline, prompts, seed=0) == plain).all())}

    def points(self, target: str) -> dict[str, torch.Tensor]:
        """Where attacks learn: states of the base's own runs for the target, and its velocities there; made once."""
        path = self.folder / f"points_{target}.safetensors"
        if not path.is_file():
            found = attack_points(self.load(), target)
            partial = path.with_suffix(f".{multiprocessing.current_process().pid}")
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
            partial.replace(path)
        return load_file(path)

    def evaluate_method(self, method: str, target: str, seed: int) -> dict[str, Any]:
        """Figures of a method of any kind."""
        armed, groups = self.arm(method, target, seed), self.groups(target)
        report = judge_method(armed, target, groups, self.base_clips(target, groups))
        if seed == 0:
            report.save(self.folder / f"report_{method}_{target}")
        armed.facts.pop("history", None)
        return {**self.figures(report), "seconds": armed.seconds, **armed.facts}

    def attack(self, method: str, target: str, seed: int, **strength: int) -> dict[str, Any]:
        """Share of clips that show the target under embeddings learned against a method."""
        armed, count = self.arm(method, target, seed), max(2, self.num_clips // 2)
        return {"read": attack_method(armed, target, self.points(target), count, **strength)}

    def long_attack(self, method: str, target: str, seed: int) -> dict[str, Any]:
        """The same, twice as long, and the best of three."""
        return self.attack(method, target, seed, steps=800, restarts=3)

    def cost(self, method: str, target: str) -> dict[str, Any]:
        """What drawing with a method takes."""
        return cost_of_method(self.arm(method, target, 0), target, self.model)

    def evaluate_document(self, target: str) -> dict[str, Any]:
        """Figures of the design document's recipe."""
        armed = self.arm("document", target, 0)
        return {**self.figures(self.judged(armed.pipeline, target)), "seconds": armed.seconds}

    def evaluate_neutral(self, target: str) -> dict[str, Any]:
        """Figures of the recipe with a neutral word as anchor."""
        pipeline = self.load()
        train_digits_eraser(pipeline, target, anchor_concept=NEUTRAL_DIGIT if target in DIGITS else NEUTRAL_COLOR)
        return self.figures(self.judged(pipeline, target))

    def evaluate_defended(self, target: str) -> dict[str, Any]:
        """Figures of an eraser that was trained against learned embeddings, and attempts to undo it."""
        pipeline = self.load()
        train_digits_eraser(pipeline, target, recipe=replace(recipe_of(pipeline), **_DEFENCE))
        folder = self.folder / f"eraser_{target}_defended"
        save_eraser(pipeline, folder)
        return {**self.figures(self.judged(pipeline, target)), "revival": measure_revival(folder, target, self.model)}

    def evaluate_revival(self, target: str) -> dict[str, Any]:
        """Attempts to undo the first eraser."""
        return measure_revival(self.eraser(target, 0), target, self.model)

    def evaluate_pair(self, first: str, second: str) -> dict[str, Any]:
        """Two erasers at once."""
        single = [self.groups(word, num_preserved=240) for word in (first, second)]
        others = [p for p in single[0]["preserved"] if f" {second}" not in f" {p}"]
        groups = {"target": single[0]["target"][::2], "preserved": others, "second target": single[1]["target"][::2]}
        pipeline = self.load()
        for word in (first, second):
            load_eraser(pipeline, self.eraser(word, 0), adapter_name=word)
        pipeline.transformer.set_adapters([first, second])
        clips = self.base_clips(f"{first}_{second}", groups)
        return self.figures(evaluate(pipeline, first, groups, base_clips=clips))

    def evaluate_stack(self, *targets: str) -> dict[str, Any]:
        """Erasers of all targets at once, on prompts that name one of them, and on others that name none."""
        named = [(prompt, {*prompt.split()} & {*targets}) for prompt in write_prompts()]
        count = self.num_clips // 2
        of_each = {word: spread([p for p, words in named if words == {word}], count) for word in targets}
        rest = spread([prompt for prompt, words in named if not words], 2 * count)
        groups = {"target": of_each.pop(targets[0]), "preserved": rest, **of_each}
        pipeline = self.load()
        for word in targets:
            load_eraser(pipeline, self.eraser(word, 0), adapter_name=word)
        pipeline.transformer.set_adapters(list(targets))
        clips = self.base_clips("_".join(targets), groups)
        found = self.figures(evaluate(pipeline, targets[0], groups, base_clips=clips))
        return {**found, "targets": list(targets)}


def tasks_of(
    targets: Sequence[str], parts: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> Iterator[Task]:
    """What is asked for; erasers come first, because other tasks load them."""
    digits = [target for target in targets if target in DIGITS]
    if "erasers" in parts:
        yield from (Task(f"{t}_{seed}", "evaluate_method", (ERASER, t, seed)) for seed in seeds for t in targets)
        yield from (Task(f"{target}_scales", "evaluate_scales", (target,)) for target in targets)
    for part, name, work in _OF_METHODS:
        if part in parts:
            for seed in seeds:
                for target in targets:
                    for method in methods if seed == seeds[0] else [method for method in methods if method in TRAINED]:
                        yield Task(f"{name}_{method}_{target}_{seed}", work, (method, target, seed))
    if "costs" in parts:
        yield from (Task(f"cost_{method}", "cost", (method, targets[0])) for method in methods)
    for part in ("document", "neutral", "defended", "revival"):
        if part in parts:
            words = digits if part == "revival" else targets
            yield from (Task(f"{target}_{part}", f"evaluate_{part}", (target,)) for target in words)
    if "pairs" in parts:
        pairs = [(a, b) for index, a in enumerate(digits) for b in digits[index + 1 :]]
        yield from (Task(f"pair_{a}_{b}", "evaluate_pair", (a, b)) for a, b in pairs)
    if "stack" in parts and len(targets) > 1:
        yield Task(f"stack_{'_'.join(targets)}", "evaluate_stack", tuple(targets))


def run_tasks(bench: Bench, tasks: Sequence[Task]) -> None:
    """One after the other, in one process."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for task in tasks:
        bench.once(task)


def run_all(bench: Bench, tasks: Sequence[Task], processes: int) -> None:
    """Shared out by target, so that no two processes train the same eraser; what needs several targets comes last."""
    if processes < 2:
        return run_tasks(bench, tasks)
    shares: dict[str, list[Task]] = {}
    last = [task for task in tasks if task.work in ("evaluate_pair", "evaluate_stack")]
    for task in tasks:
        if task not in last:
            shares.setdefault(next(word for word in task.arguments if word in TARGETS), []).append(task)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:  # fmt: skip
        list(pool.map(run_tasks, [bench] * len(shares), shares.values()))
        list(pool.map(run_tasks, [bench] * len(last), [[task] for task in last]))
    return None


def main(input_args: list[str] | None = None) -> None:
    """Train, evaluate, and write tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, help="[outputs/erasure_on_ and the name of the model's example]")
    parser.add_argument("--model", default="", help="folder of a model of the moving digits [the bundled CogVideoX]")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    usual = [name for name in METHODS if name == ESD or name not in ESD_RATES]
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=usual)
    parser.add_argument("--seeds", type=int, default=3, help="of what is trained: from 0 on")
    parser.add_argument("--num_clips", type=int, default=_USUAL_CLIPS, help="of each target")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args(input_args)
    model = args.model or str(MODEL_DIR)
    folder = args.work_dir or Path("outputs", f"erasure_on_{Path(model).resolve().parent.name}")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, model, args.num_clips)
    run_all(bench, list(tasks_of(args.targets, args.parts, args.methods, range(args.seeds))), args.processes)
    if "table" in args.parts:
        results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        results = {name: run for name, run in results.items() if not name.startswith("training_")}
        text = erasure_tables(results, args.targets)
        write_results(f"erasure_on_{bench.name}", {"recipe": asdict(recipe_of(bench.load())), "runs": results}, text)
        print(text)


if __name__ == "__main__":
    main()

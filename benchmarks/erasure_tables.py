"""The tables of the erasure benchmark."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.machine import table
from examples.digits.prompts import DIGITS

Runs = dict[str, Any]
_ROBUST = ("held-out template", "paraphrases")
_ALL = "all"


def _side(run: Runs, scale: float = 1.0) -> str:
    return next(name for name, value in run["settings"]["scales"].items() if value == scale)


def _rate(run: Runs, group: str, aspect: str, scale: float = 1.0) -> tuple[float, float]:
    """(base, erased)."""
    found = run["groups"][group]["rates"][_side(run, scale)][aspect]
    return found["base"], found["other"]


def _aspects(target: str) -> tuple[str, tuple[str, ...]]:
    """The erased aspect, and those that must stay on all prompts."""
    return ("digit", ("color", "direction")) if target in DIGITS else ("color", ("digit", "direction"))


def figures_of(run: Runs, target: str, scale: float = 1.0) -> dict[str, float]:
    """The figures of one run, and what the base has beside them."""
    concept, kept = _aspects(target)
    groups = list(run["groups"])
    found = {
        "target": _rate(run, "target", concept, scale),
        "others": _rate(run, "preserved", concept, scale),
        **{f"kept {aspect}": _rate(run, _ALL, aspect, scale) for aspect in kept},
    }
    figures = {key: value[1] for key, value in found.items()}
    figures |= {f"base {key}": value[0] for key, value in found.items()}
    robust = [group for group in _ROBUST if group in groups]
    if robust:
        figures["robust"] = max(_rate(run, g, concept, scale)[1] for g in robust)
        figures["base robust"] = min(_rate(run, g, concept, scale)[0] for g in robust)
    distance = run["groups"]["target"]["figures"][_side(run, scale)]["ink_distance"]
    figures["distance"] = distance["other"] / distance["base"]
    return figures


def _cell(runs: list[dict[str, float]], key: str, worst: Any) -> str:
    values = [run[key] for run in runs]
    return f"{mean(values):.3f} ({worst(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def _row(name: str, target: str, runs: list[dict[str, float]]) -> list[str]:
    kept = [key for key in runs[0] if key.startswith("kept ")]
    changes = [
        {**run, "kept": min(run[k] - run[f"base {k}"] for k in kept), "loss": run["others"] - run["base others"]}
        for run in runs
    ]  # fmt: skip
    cells = [
        _cell(changes, "target", max),
        _cell(changes, "robust", max) if "robust" in runs[0] else "",
        _cell(changes, "loss", min),
        _cell(changes, "kept", min),
        _cell(changes, "distance", max),
    ]
    return [name, target, *cells]


HEADER = [
    "eraser", "target", "target still read", "held-out template or paraphrases, the worse",
    "others read right, against base", "colour or digit, motion: the worse, against base",
    "distance to a real digit / base's",
]  # fmt: skip


def _main_rows(results: Runs, targets: list[str], seeds: int) -> list[list[str]]:
    rows = []
    for target in targets:
        runs = [results[f"{target}_{seed}"] for seed in range(seeds)]
        found = [figures_of(run, target) for run in runs]
        base = found[0]
        kept = [value for key, value in base.items() if key.startswith("base kept")]
        cells = [base["base target"], base["base robust"], base["base others"], min(kept)]
        rows.append(["none", target, *(f"{value:.3f}" for value in cells), "1"])
        for part, name in (
            ("document", "design document's recipe, as its code has it"),
            ("neutral", "neutral word as anchor"),
        ):
            if f"{target}_{part}" in results:
                rows.append(_row(name, target, [figures_of(results[f"{target}_{part}"], target)]))
        rows.append(_row("this project's", target, found))
        if f"{target}_defended" in results:
            defended = figures_of(results[f"{target}_defended"], target)
            rows.append(_row("the same, trained against embeddings", target, [defended]))
        scales = results[f"{target}_scales"]
        rows += [
            _row(f"the same at scale {scale}", target, [figures_of(scales, target, scale)])
            for scale in scales["settings"]["scales"].values()
        ]
    return rows


def _becomes(results: Runs, targets: list[str]) -> list[list[str]]:
    rows = []
    for target in targets:
        name = "reads_as" if target in DIGITS else "reads_as_color"
        row = [target]
        for part in ("0", "document"):
            run = results.get(f"{target}_{part}")
            shares = run["groups"]["target"]["readings"][name][_side(run)] if run else {}
            row.append(", ".join(f"{word} {s:.2f}" for word, s in shares.items() if s >= 0.02))
        rows.append(row)
    return rows


def _scale_zero(results: Runs, targets: list[str]) -> str:
    same = [results[f"{target}_scales"]["scale 0 is the base"] for target in targets]
    return f"At scale 0 the clips are the base's to the bit: {sum(same)} of {len(same)} erasers."


def _pairs(results: Runs) -> list[list[str]]:
    rows = []
    for name, run in results.items():
        if not name.startswith("pair_"):
            continue
        _, first, second = name.split("_")
        rates = [_rate(run, group, "digit") for group in ("target", "second target", "preserved")]
        erased = [f"{other:.3f}" for _, other in rates]
        rows.append([f"{first} + {second}", *erased[:2], f"{rates[2][0]:.3f}", erased[2]])
    return rows


def _revivals(results: Runs) -> list[list[str]]:
    rows = []
    for name, run in sorted(results.items()):
        target, _, part = name.rpartition("_")
        if part == "revival":
            rows.append([target, *(f"{run[key]:.3f}" for key in run["shown"])])
        elif part == "defended":
            found = run["revival"]
            title = f"{target}, trained against embeddings"
            rows.append([title, *(f"{found[key]:.3f}" for key in found["shown"])])
    return rows


def erasure_tables(results: Runs, targets: list[str], seeds: int) -> str:
    """Everything, as Markdown."""
    parts = [
        "Mean of the seeds, the worst seed in brackets.",
        table(HEADER, _main_rows(results, targets, seeds)),
        _scale_zero(results, targets),
        "What the target's prompts show instead:",
        table(["erased", "read as", "with the design document's recipe"], _becomes(results, targets)),
    ]
    if pairs := _pairs(results):
        header = ["erasers", "first still read", "second still read", "other eight, base", "other eight"]
        parts += ["Two erasers at once:", table(header, pairs)]
    if revivals := _revivals(results):
        shown = next(run["shown"] for name, run in results.items() if name.endswith("_revival"))
        parts += ["Target read after attempts to bring it back:", table(["erased", *shown], revivals)]
    return "\n\n".join(parts)

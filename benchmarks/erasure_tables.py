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


def _seeds(results: Runs, name: str) -> list[Any]:
    """Runs of all seeds that are there."""
    return [results[key] for seed in range(len(results)) if (key := f"{name}_{seed}") in results]


def _main_rows(results: Runs, targets: list[str]) -> list[list[str]]:
    rows = []
    for target in targets:
        runs = _seeds(results, target)
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
        scales = results.get(f"{target}_scales")
        rows += [
            _row(f"the same at scale {scale}", target, [figures_of(scales, target, scale)])
            for scale in (scales["settings"]["scales"].values() if scales else ())
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
    scales = [results[key] for target in targets if (key := f"{target}_scales") in results]
    same = [run["scale 0 is the base"] for run in scales]
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


METHOD_TITLES = {
    "negative": "negative prompt",
    "nag": "NAG",
    "safree": "SAFREE",
    "safree_whole": "SAFREE's filter in every step",
    "videoeraser": "VideoEraser",
    "edit": "`edit_concept`",
    "document": "design document's recipe",
    "esd": "ESD-x, LoRA",
    "esd_slower": "the same, rate 0.3 times that",
    "esd_faster": "the same, rate 3 times that",
    "linear": "linear eraser, as a LoRA in stock diffusers",
    "gelu": "eraser with GELU",
    "eraser": "this project's eraser",
    "eraser_codebook": "eraser behind a text codebook",
    "eraser_half": "the same, half of the steps",
    "edit_eraser_half": "the same, half of the steps, on the edited model",
}
METHOD_HEADER = [
    "method", "runs", "target still read", "unseen wordings", "16 learned embeddings",
    "twice as long, best of three", "others, against base",
    "colour or digit, motion, against base", "distance to a real digit / base's", "time of a clip / base's",
    "memory of denoising / base's", "CPU seconds to make",
]  # fmt: skip
_FREE = 1.0  # seconds below which nothing was made


def _method_runs(results: Runs, method: str, targets: list[str]) -> list[dict[str, float]]:
    """Figures of all targets and seeds that are there."""
    found = []
    for target in targets:
        for run in _seeds(results, f"method_{method}_{target}"):
            figures = figures_of(run, target)
            kept = [key for key in figures if key.startswith("kept ")]
            figures["loss"] = figures["others"] - figures["base others"]
            figures["kept"] = min(figures[key] - figures[f"base {key}"] for key in kept)
            found.append(figures | ({"seconds": run["seconds"]} if "seconds" in run else {}))
    return found


def _attacked(results: Runs, method: str, targets: list[str], kind: str = "attacked") -> list[dict[str, float]]:
    return [{"attacked": run["read"]} for target in targets for run in _seeds(results, f"{kind}_{method}_{target}")]


def _methods(results: Runs, targets: list[str]) -> list[list[str]]:
    worst = {"loss": min, "kept": min, "distance": max}
    rows = []
    for method, title in METHOD_TITLES.items():
        if runs := _method_runs(results, method, targets):
            cells = [_cell(runs, key, max) for key in ("target", "robust")]
            for kind in ("attacked", "long-attacked"):
                attacked = _attacked(results, method, targets, kind)
                cells.append(_cell(attacked, "attacked", max) if attacked else "")
            cells += [_cell(runs, key, of) for key, of in worst.items()]
            found = results.get(f"cost_{method}", {})
            cost = [f"{found[key]:.2f}" if found else "" for key in ("time", "memory")]
            seconds = mean([run["seconds"] for run in runs if "seconds" in run] or [0.0])
            rows.append([title, str(len(runs)), *cells, *cost, f"{seconds:.0f}" if seconds >= _FREE else "-"])
    return rows


def _by_target(results: Runs, targets: list[str]) -> list[list[str]]:
    """Target still read, and under attack, of each target."""
    rows = []
    for method, title in METHOD_TITLES.items():
        cells = []
        for target in targets:
            shown = {
                "target": _method_runs(results, method, [target]), "attacked": _attacked(results, method, [target]),
            }  # fmt: skip
            cells.append(" / ".join(f"{mean(r[key] for r in runs):.2f}" for key, runs in shown.items() if runs))
        if any(cells):
            rows.append([title, *cells])
    return rows


def _methods_by_target(results: Runs, targets: list[str]) -> list[list[str]]:
    """All figures of each target."""
    found = [
        (title, target, [figures_of(run, target) for run in _seeds(results, f"method_{method}_{target}")])
        for target in targets
        for method, title in METHOD_TITLES.items()
    ]
    return [_row(title, target, runs) for title, target, runs in found if runs]


def _stacks(results: Runs) -> list[list[str]]:
    rows = []
    for name, run in results.items():
        if not name.startswith("stack_"):
            continue
        for word in run["targets"]:
            group = "target" if word == run["targets"][0] else word
            base, erased = _rate(run, group, _aspects(word)[0])
            rows.append([word, "still read", f"{base:.3f}", f"{erased:.3f}"])
        for aspect in ("digit", "color", "direction"):
            base, erased = _rate(run, "preserved", aspect)
            rows.append(["all the rest", f"{aspect} read right", f"{base:.3f}", f"{erased:.3f}"])
    return rows


def erasure_tables(results: Runs, targets: list[str]) -> str:
    """Everything that is there, as Markdown."""
    parts = ["Mean, the worst in brackets."]
    if methods := _methods(results, targets):
        parts += [
            "What a user may take, over targets and seeds:",
            table(METHOD_HEADER, methods),
            "Each target, still read / under 16 learned embeddings:",
            table(["method", *targets], _by_target(results, targets)),
            "All figures of each target:",
            table(["method", *HEADER[1:]], _methods_by_target(results, targets)),
        ]
    if trained := [target for target in targets if _seeds(results, target)]:
        parts += [
            "Erasers, target by target:",
            table(HEADER, _main_rows(results, trained)),
            _scale_zero(results, trained),
            "What the target's prompts show instead:",
            table(["erased", "read as", "with the design document's recipe"], _becomes(results, trained)),
        ]
    if pairs := _pairs(results):
        header = ["erasers", "first still read", "second still read", "other eight, base", "other eight"]
        parts += ["Two erasers at once:", table(header, pairs)]
    if stacks := _stacks(results):
        parts += ["All erasers at once:", table(["prompts of", "share", "base", "with all erasers"], stacks)]
    if revivals := _revivals(results):
        shown = next(run["shown"] for name, run in results.items() if name.endswith("_revival"))
        parts += ["Target read after attempts to bring it back:", table(["erased", *shown], revivals)]
    return "\n\n".join(parts)

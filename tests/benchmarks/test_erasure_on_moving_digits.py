"""The erasure benchmark: its tasks, its tables, and methods that are drawn and judged like the base."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import erasure_on_moving_digits
from benchmarks.erasure_methods import METHODS, TRAINED, Armed, arm, judge_method
from benchmarks.erasure_on_moving_digits import Bench, Task, run_all, tasks_of
from benchmarks.erasure_tables import METHOD_TITLES, erasure_tables
from examples.moving_digits.check_model import MODEL_DIR, load_pipeline

GROUPS = ("target", "preserved", "held-out template", "paraphrases", "all")


def run(target: float, others: float, **found):
    """What a method's file holds."""

    def rates(value):
        return {aspect: {"base": 1.0, "other": value} for aspect in ("digit", "color", "direction")}

    summary = {
        group: {
            "rates": {"erased": rates(target if group != "preserved" else others)},
            "figures": {"erased": {"ink_distance": {"base": 20.0, "other": 25.0}}},
            "readings": {"reads_as": {"erased": {"nine": 1.0}}},
        }
        for group in GROUPS
    }
    return {"groups": summary, "settings": {"scales": {"erased": 1.0}}, **found}


def test_every_method_has_a_title():
    assert {*METHODS, *TRAINED} == {*METHOD_TITLES}


def test_tasks_are_those_asked_for():
    found = list(tasks_of(["seven", "red"], ["methods", "pairs", "stack"], ["nag", "esd"], range(2)))
    assert [task.name for task in found] == [
        "method_nag_seven_0", "method_nag_red_0", "method_esd_seven_0", "method_esd_red_0", "method_esd_seven_1",
        "method_esd_red_1", "stack_seven_red",
    ]  # fmt: skip
    assert [task.name for task in tasks_of(["seven", "three", "red"], ["pairs"], [], range(1))] == ["pair_seven_three"]
    works = {task.work for task in tasks_of(["seven"], erasure_on_moving_digits.PARTS, [*METHODS, "eraser"], range(1))}
    assert all(hasattr(Bench, work) for work in works)


def test_tables_show_what_is_there():
    cost = {"time": 1.5, "memory": 1.25, "seconds": 12.0}
    results = {
        "method_esd_seven_0": run(0.1, 0.9, attacked=0.75, cost=cost),
        "method_esd_seven_1": run(0.3, 0.7, attacked=0.25, cost=cost),
        "seven_0": run(0.0, 1.0),
    }
    text = erasure_tables(results, ["seven", "red"])
    row = "| ESD-x, LoRA | 2 | 0.200 (0.300) | 0.200 (0.300) | 0.500 (0.750) | -0.200 (-0.300) | -0.800 (-0.900) "
    assert f"{row}| 1.250 (1.250) | 1.50 | 1.25 | 12 |" in text
    assert "| ESD-x, LoRA | 0.20 / 0.50 |  |" in text
    assert "| this project's | seven | 0.000 |" in text
    assert "NAG" not in text
    assert "red" not in text.replace("| method | seven | red |", "")


def test_results_are_made_once(tmp_path, monkeypatch):
    bench, calls = Bench(tmp_path, "model"), []

    def evaluate(self, *arguments):
        calls.append(arguments)
        return {"is": arguments}

    monkeypatch.setattr(Bench, "evaluate_pair", evaluate)
    tasks = [Task("pair_a_b", "evaluate_pair", ("a", "b")), Task("pair_a_c", "evaluate_pair", ("a", "c"))]
    run_all(bench, tasks, 1)
    run_all(bench, tasks, 1)
    assert calls == [("a", "b"), ("a", "c")]
    assert json.loads((tmp_path / "pair_a_c.json").read_text()) == {"is": ["a", "c"]}


def test_methods_are_judged_beside_the_base():
    groups = {"target": ["a red seven moving right"] * 2, "preserved": ["a blue two moving up"] * 2}
    base = Armed(load_pipeline())
    empty = np.zeros((4, 9, 16, 16, 3), np.uint8)
    empty[:, :, 4:6] = np.arange(16, dtype=np.uint8)[:, None] * 16
    plain = judge_method(base, "seven", groups, empty)
    assert plain.rate("target") == 1.0
    assert plain.rate("preserved") == 1.0
    armed = arm("safree_whole", "seven", 0, MODEL_DIR)
    changed = judge_method(armed, "seven", groups, empty)
    assert changed.groups["target"]["figures"] != plain.groups["target"]["figures"]
    assert changed.settings["concept_aspect"] == "digit"
    assert not armed.pipeline.transformer._forward_hooks

"""The erasure benchmark: its tasks, its tables, and methods that are drawn and judged like the base."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig

from benchmarks import erasure_methods, erasure_on_moving_digits
from benchmarks.erasure_methods import METHODS, TRAINED, Armed, arm, judge_method
from benchmarks.erasure_on_moving_digits import Bench, Task, run_all, tasks_of
from benchmarks.erasure_tables import METHOD_TITLES, erasure_tables
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.files import save_eraser
from diffusers_ext.evaluation.erasure_report import ErasureReport
from examples.moving_digits.check_model import MODEL_DIR, load_pipeline
from examples.moving_digits.erasers import WAN_RECIPE
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser, velocity

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
    assert {*TRAINED} < {*METHODS} == {*METHOD_TITLES}


def test_tasks_are_those_asked_for():
    found = list(tasks_of(["seven", "red"], ["methods", "costs", "pairs", "stack"], ["nag", "esd"], range(2)))
    assert [task.name for task in found] == [
        "method_nag_seven_0", "method_esd_seven_0", "method_nag_red_0", "method_esd_red_0", "method_esd_seven_1",
        "method_esd_red_1", "cost_nag", "cost_esd", "stack_seven_red",
    ]  # fmt: skip
    assert [task.name for task in tasks_of(["seven", "three", "red"], ["pairs"], [], range(1))] == ["pair_seven_three"]
    works = {task.work for task in tasks_of(["seven"], erasure_on_moving_digits.PARTS, METHODS, range(1))}
    assert all(hasattr(Bench, work) for work in works)


def test_tables_show_what_is_there():
    results = {
        "method_esd_seven_0": run(0.1, 0.9, seconds=10.0),
        "method_esd_seven_1": run(0.3, 0.7, seconds=14.0),
        "attacked_esd_seven_0": {"read": 0.5},
        "cost_esd": {"time": 1.5, "memory": 1.25},
        "seven_0": run(0.0, 1.0),
    }
    text = erasure_tables(results, ["seven", "red"])
    row = "| ESD-x, LoRA | 2 | 0.200 (0.300) | 0.200 (0.300) | 0.500 |  | -0.200 (-0.300) | -0.800 (-0.900) "
    assert f"{row}| 1.250 (1.250) | 1.50 | 1.25 | 12 |" in text
    assert "| ESD-x, LoRA | 0.20 / 0.50 |  |" in text
    assert (
        f"| ESD-x, LoRA | seven {row.removeprefix('| ESD-x, LoRA | 2 ').replace('| 0.500 |  ', '')}| 1.250 (1.250) |"
        in text
    )
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


def test_methods_are_judged_beside_the_base(tmp_path):
    groups = {"target": ["a red seven moving right"] * 2, "preserved": ["a blue two moving up"] * 2}
    base = Armed(load_pipeline())
    empty = np.zeros((4, 9, 16, 16, 3), np.uint8)
    empty[:, :, 4:6] = np.arange(16, dtype=np.uint8)[:, None] * 16
    plain = judge_method(base, "seven", groups, empty)
    assert plain.rate("target") == 1.0
    assert plain.rate("preserved") == 1.0
    armed = arm("safree_whole", "seven", 0, MODEL_DIR, tmp_path)
    changed = judge_method(armed, "seven", groups, empty)
    assert changed.groups["target"]["figures"] != plain.groups["target"]["figures"]
    assert changed.settings["concept_aspect"] == "digit"
    assert not armed.pipeline.transformer._forward_hooks


@pytest.mark.parametrize("name", ["esd_slower", "edit_eraser_half", "linear", "eraser"])
def test_what_is_trained_is_kept(name, tmp_path, monkeypatch):
    monkeypatch.setattr(erasure_methods, "load_pipeline", lambda model: tiny_video_pipeline())
    monkeypatch.setattr(erasure_methods, "recipe_of", lambda pipeline: WAN_RECIPE)
    plain = velocity(tiny_video_pipeline().transformer)

    def made(pipeline, target, seed):
        if name == "esd_slower":
            torch.manual_seed(seed)
            config = LoraConfig(r=2, target_modules=["attn1.to_k"], init_lora_weights=False)
            pipeline.transformer.add_adapter(config, "esd")
            return Armed(pipeline, facts={"rate": 1.0})
        if name in ("linear", "eraser"):  # a LoRA in stock diffusers where the model's recipe is linear
            add_random_eraser(pipeline.transformer, kind="linear")
            return Armed(pipeline, facts={"rate": 1.0})
        weight = pipeline.transformer.patch_embed.text_proj.weight
        layer = "transformer.patch_embed.text_proj.lora"
        edit = {f"{layer}_A.weight": torch.eye(weight.shape[1]), f"{layer}_B.weight": torch.ones_like(weight)}
        erasure_methods._fuse(pipeline, edit)
        add_random_eraser(pipeline.transformer)
        return Armed(pipeline, facts={"rate": 1.0}, edit=edit)

    monkeypatch.setitem(METHODS, name, made)
    trained = velocity(made(tiny_video_pipeline(), "seven", 3).pipeline.transformer)
    first = arm(name, "seven", 3, "model", tmp_path)
    monkeypatch.setitem(METHODS, name, None)
    again = arm(name, "seven", 3, "model", tmp_path)
    for armed in (first, again):
        assert torch.allclose(velocity(armed.pipeline.transformer), trained, atol=1e-5)
    assert not torch.allclose(trained, plain, atol=1e-2)
    erasers = eraser_layers(again.pipeline.transformer)
    assert bool(erasers) is (name == "edit_eraser_half")
    assert (again.seconds, again.facts) == (first.seconds, {"rate": 1.0})


def test_a_stack_is_asked_for_one_word_at_a_time(tmp_path, monkeypatch):
    pipeline, seen = tiny_video_pipeline(), {}
    add_random_eraser(pipeline.transformer)
    save_eraser(pipeline, tmp_path / "kept")

    def evaluate(pipeline, target, groups, **options):
        seen.update(groups=groups, active=pipeline.transformer.active_adapters())
        return ErasureReport({"scales": {"erased": 1.0}}, {}, [])

    monkeypatch.setattr(erasure_on_moving_digits, "load_pipeline", lambda model: tiny_video_pipeline())
    monkeypatch.setattr(erasure_on_moving_digits, "evaluate", evaluate)
    monkeypatch.setattr(Bench, "base_clips", lambda *arguments: None)
    monkeypatch.setattr(Bench, "eraser", lambda *arguments: tmp_path / "kept")
    words = ["three", "seven", "red"]
    found = Bench(tmp_path, "tiny", num_clips=20).evaluate_stack(*words)
    assert found["targets"] == words
    assert sorted(seen["active"]) == sorted(words)
    groups = seen["groups"]
    assert {name: len(prompts) for name, prompts in groups.items()} == {
        "target": 10, "preserved": 20, "seven": 10, "red": 10,
    }  # fmt: skip
    for name, word in (("target", "three"), ("seven", "seven"), ("red", "red"), ("preserved", None)):
        assert all({*prompt.split()} & {*words} == ({word} if word else set()) for prompt in groups[name])
    table = erasure_tables({"stack_three_seven_red": run_of_stack(words)}, words)
    assert "| red | still read | 1.000 | 0.250 |" in table
    assert "| all the rest | color read right | 1.000 | 0.750 |" in table


def run_of_stack(words):
    """What a stack's file holds."""
    found = run(0.25, 0.75, targets=words)
    return {**found, "groups": {**found["groups"], **dict.fromkeys(words[1:], found["groups"]["target"])}}

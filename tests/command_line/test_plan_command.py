from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import diffusers_ext.planning
from diffusers_ext.planning import PhasePlan, RunPlan, plan_run, setting_names
from diffusers_ext.planning.plan import TOOLS

GIB = 2**30
PLAN = RunPlan("eraser", "tiny", {"rank": 4}, {"all": 3 * GIB}, (PhasePlan("training", 3 * GIB, 1.0),),
               {"eraser": 5}, 0, "a card")  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[tuple[tuple, dict[str, Any]]]:
    """What `plan_run` was asked, with a ready plan in its place: a real one takes minutes."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def planned(*arguments, memory_gib: float | None = None, **options) -> RunPlan:
        calls.append((arguments, {"memory_gib": memory_gib, **options}))
        return replace(PLAN, memory=None if memory_gib is None else int(memory_gib * GIB))

    monkeypatch.setattr(diffusers_ext.planning, "plan_run", planned)
    return calls


@pytest.mark.parametrize("tool", TOOLS)
def test_every_setting_of_a_plan_is_a_flag(run, tool):
    shown = run("plan", tool, "--help").out
    assert [name for name in setting_names(tool) if f"--{name}" not in shown] == []


def test_the_plan_is_that_of_the_library(run, monkeypatch, digits):
    plans = []
    monkeypatch.setattr(
        diffusers_ext.planning, "plan_run", lambda *a, **o: plans.append(plan_run(*a, **o)) or plans[0]
    )
    ran = run(
        "plan", "nullspace", pretrained_model_name_or_path=digits, memory_gib=80, json=True,
        train_batch_size=1, max_train_steps=3, directions="plain",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.facts == plans[0].to_dict()
    assert ran.facts["setting"]["max_train_steps"] == 3
    assert ran.facts["peak"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eraser"], {}),
        (["eraser", "--no-gradient_checkpointing", "--rows_in_turn", "--rank", "16"],
         {"gradient_checkpointing": False, "separate_passes": True, "rank": 16}),
        (["eraser", "--gpu", "here", "--memory_gib", "11.5"], {"gpu": "here", "memory_gib": 11.5}),
        (["nullspace", "--features", "q", "k", "--layers", "0", "3", "--no_sub_phrases"],
         {"features": ["q", "k"], "layers": [0, 3], "no_sub_phrases": True}),
        (["nullspace", "--layers", "all", "--guidance_scale", "1"],
         {"layers": "all", "guidance_scale": 1.0}),
        (["golden-noise", "--reward", "none", "--structure", '{"width": 8}', "--use_ema"],
         {"reward": None, "structure": {"width": 8}, "use_ema": True}),
    ],
)  # fmt: skip
def test_only_what_is_given_reaches_the_plan(run, asked, words, expected):
    ran = run("plan", *words, "--pretrained_model_name_or_path", "SDXL")
    assert ran.code in (0, 3)
    assert asked == [((words[0], "SDXL"), {"gpu": None, "memory_gib": None, **expected})]


def test_a_run_that_does_not_fit_is_exit_code_3(run, asked):
    def plan(*flags):
        return run("plan", "eraser", "--pretrained_model_name_or_path", "x", *flags)

    assert "Name a GPU or its memory" in plan().out
    assert "\n\nFits: peak 3.00 GiB" in plan("--memory_gib", "4").out
    small = plan("--memory_gib", "3.5")
    assert (plan().code, plan("--memory_gib", "4").code, small.code) == (0, 0, 3)
    assert "Does not fit: peak 3.00 GiB" in small.out
    assert json.loads(plan("--memory_gib", "3.5", "--json").out)["fits"] is False


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        ("eraser", {"pretrained_model_name_or_path": "x"}, "`model` must be the folder of a pipeline"),
        ("eraser", {"gpu": "abacus"}, "`--gpu` must be 'here' or one of"),
        ("eraser", {"max_train_steps": 0}, "`--max_train_steps`"),
        ("eraser", {"checkpointing_steps": 0}, "`--checkpointing_steps` must be at least 1, got 0."),
        ("nullspace", {"layers": "first"}, "`--layers` must be 'all' or indices, got ['first']."),
        ("golden-noise", {"mixed_precision": "fp8"}, "`--mixed_precision`"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(run, tool, flags, message):
    ran = run("plan", tool, **{"pretrained_model_name_or_path": "CogVideoX-2b", **flags})
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err


def test_a_structure_that_is_no_json_is_wrong_usage(run):
    for structure in ("width=8", "[1]"):
        ran = run("plan", "golden-noise", pretrained_model_name_or_path="SDXL", structure=structure)
        assert ran.code == 2
        assert f"argument --structure: must be a JSON object, got '{structure}'" in ran.err

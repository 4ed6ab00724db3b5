from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_ext.training.nullspace.run import parse_args
from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.setup import (
    check_resume,
    loop_settings,
    make_accelerator,
    make_loop,
    make_optimizer,
    make_output_dir,
    make_schedule,
    run_facts,
    start_trackers,
)


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerator):
    pass


@pytest.fixture
def args(subject_line) -> argparse.Namespace:
    return parse_args(subject_line())


def test_the_accelerator_follows_the_arguments_and_writes_nothing(args, tmp_path):
    args.gradient_accumulation_steps, args.mixed_precision, args.seed = 3, "bf16", 11
    accelerator = make_accelerator(args)
    drawn = (torch.rand(1).item(), np.random.rand(), random.random())
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.mixed_precision == "bf16"
    assert not (tmp_path / "out").exists()
    make_accelerator(args)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == drawn
    make_output_dir(args, accelerator)
    make_output_dir(args, accelerator)
    assert (tmp_path / "out").is_dir()


def test_trackers_never_see_the_token(args, tmp_path, monkeypatch):
    args.report_to, args.hub_token = "tensorboard", "secret"
    accelerator, given = make_accelerator(args), []
    monkeypatch.setattr(accelerator, "init_trackers", lambda name, config: given.append(config))
    start_trackers(accelerator, args, "run")
    assert given[0]["rank"] == args.rank
    assert given[0]["instance_prompt"] == args.instance_prompt
    assert "secret" not in given[0].values()
    args.report_to = None
    start_trackers(accelerator, args, "run")
    assert len(given) == 1


@pytest.mark.parametrize(("scale", "rate"), [(False, 0.5), (True, 0.5 * 4 * 3 * 2)])
def test_the_optimizer_has_the_asked_rate(args, scale, rate):
    args.learning_rate, args.scale_lr = 0.5, scale
    args.train_batch_size, args.gradient_accumulation_steps = 4, 3
    args.adam_beta1, args.adam_weight_decay, args.adam_epsilon = 0.8, 0.1, 1e-6
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(args, [parameter], 2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
        rate, (0.8, 0.999), 0.1, 1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`learning_rate` must be positive, got 0.0"):
        replace(args, learning_rate=0.0)


def test_the_schedule_counts_optimizer_steps(args):
    args.learning_rate, args.lr_scheduler = 1.0, "linear"
    args.lr_warmup_steps, args.max_train_steps = 2, 6
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(args, [parameter], 3)
    schedule, rates = make_schedule(args, optimizer), []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_loop_settings_are_the_arguments(args):
    settings = loop_settings(args, "training")
    assert settings.description == "training"
    for name in ("max_train_steps", "train_batch_size", "max_grad_norm", "seed", "logging_steps"):
        assert getattr(settings, name) == getattr(args, name)


@pytest.mark.parametrize(("asked", "every"), [(None, 4), (3, 3)])
def test_a_loop_validates_every_so_many_steps_and_holds_the_number_of_processes(args, asked, every):
    args.validation_steps, draw = asked, lambda step: None
    model, accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True)
    model.bias.requires_grad_(False)
    given = (args, accelerator, model, [0.0], None, {"pictures": "abc"}, "training")
    loop = make_loop(*given, validate=draw)
    assert loop.callbacks == [(every, draw)]
    assert make_loop(*given).callbacks == []
    assert loop.checkpoints.fingerprint == {"pictures": "abc", "num_processes": 1}
    assert loop.optimizer.param_groups[0]["params"] == [model.weight]


def test_only_a_schedule_that_ends_ties_a_run_to_its_length(args):
    for name, tied in (("constant", False), ("constant_with_warmup", False), ("cosine", True)):
        args.lr_scheduler = name
        assert ("max_train_steps" in run_facts(args)) == tied
    facts = run_facts(args, model="m")
    assert facts["model"] == "m"
    assert json.loads(json.dumps(facts)) == facts


def test_resuming_is_checked_from_the_folder_alone(args, tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(1, 1))
    facts = run_facts(args, pictures="abc")
    check_resume(args, facts)
    Checkpoints(accelerator, args.output_dir, facts).save(3)
    check_resume(args, facts)  # writes no checkpoints
    args.checkpointing_steps = 1
    with pytest.raises(ValueError, match="no checkpoints of an earlier run, got .*checkpoint-3"):
        check_resume(args, facts)
    args.resume_from_checkpoint = "latest"
    check_resume(args, facts)
    check_resume(args, run_facts(args))  # pictures are not known yet
    with pytest.raises(ValueError, match="`pictures` must be the same .* was 'abc', got 'xyz'"):
        check_resume(args, {"pictures": "xyz"})
    with pytest.raises(ValueError, match="`new` must be the same .* it was None, got 1"):
        check_resume(args, {"new": 1})
    args.max_train_steps = 2
    with pytest.raises(ValueError, match="`max_train_steps` must be at least the 3 steps"):
        check_resume(args, facts)

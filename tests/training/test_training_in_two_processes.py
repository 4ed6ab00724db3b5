"""Trainings in two processes on the CPU: one under `accelerate launch`, the others forked."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.models.swin.modeling_swin import SwinDropPath

from diffusers_ext.golden_noise.networks.swin import DropPath
from examples.digits.check_model import load_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.training.eraser_runs import eraser_line, write_eraser_files
from tests.training.noise_runs import noise_line, script_of
from tests.training.noise_sets import guarded_network, judged_pairs, write_noises
from tests.training.script_runs import REPOSITORY, command_line, launch, write_prompts
from training import train_npnet

# One launch for both runs: starting the processes is what takes long.
DRIVER = """
import shutil, sys

sys.path.insert(0, {repository!r})
import torch
from accelerate import PartialState
from diffusers_ext.training.run.loop import TrainingLoop
from diffusers_ext.training.nullspace.run import main, parse_args

run = TrainingLoop.run

def run_and_keep(loop):
    model = run(loop)
    weights = {{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}
    torch.save(weights, {folder!r} + f"/rank_{{loop.accelerator.process_index}}.pt")
    return model

TrainingLoop.run = run_and_keep
PartialState.destroy_process_group = lambda self, group=None: None
whole, resumed = sys.argv[1:].copy(), sys.argv[1:].copy()
resumed[resumed.index("--output_dir") + 1] += "_resumed"
folder = main(parse_args(whole))
if PartialState().is_main_process:
    copy = str(folder) + "_resumed/checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", copy)
PartialState().wait_for_everyone()
TrainingLoop.run = run
main(parse_args([*resumed, "--resume_from_checkpoint", "latest"]))
"""


def test_two_processes_train_one_model_and_resume_it(subject_line, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(repository=str(REPOSITORY), folder=str(tmp_path)))
    script = os.path.relpath(driver.with_suffix(""), REPOSITORY / "training")
    line = subject_line(
        "whole",
        gradient_accumulation_steps=2,
        lora_dropout=0.3,
        checkpointing_steps=2,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a white three",
        num_class_images=2,
        validation_prompt="a red seven",
    )
    launch(script, line, processes=2)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]) == 14
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    saved = load_file(tmp_path / "whole" / "pytorch_lora_weights.safetensors")
    largest = max(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name)
    assert largest == max(tensor.abs().max() for tensor in ranks[0].values())
    assert load_pipeline().load_lora_weights(str(tmp_path / "whole")) is None
    report = json.loads((tmp_path / "whole" / "training_report.json").read_text())
    assert [row["step"] for row in report["history"]] == [2, 4]
    assert len(list((tmp_path / "class").iterdir())) == 2
    for name in ("pytorch_lora_weights.safetensors", "validation/step-000004-prompt-0.png"):
        resumed = (tmp_path / "whole_resumed" / name).read_bytes()
        assert resumed == (tmp_path / "whole" / name).read_bytes()


JOBS = """
import json
from importlib import import_module

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers.models.swin.modeling_swin import SwinDropPath

from diffusers_ext.golden_noise.networks.swin import DropPath

SwinDropPath.forward = DropPath.forward = lambda self, x: x
PartialState.destroy_process_group = lambda self, group=None: None
for module, line in json.load(open({jobs!r})):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    run = import_module(module)
    run.main(run.parse_args(line))
"""
# Where a gradient is rounding alone, as of a bias before a norm, Adam would make a whole step of it.
SHORT = {"max_train_steps": 3, "logging_steps": 1, "adam_epsilon": 1e-3}
CLIP = dict(zip(("num_frames", "height", "width"), (5, 32, 32)))
# Each process has a row of every kind in a step, the one process two or four.
ERASERS: dict[str, dict[str, Any]] = {
    "eraser": {"anchor_concept": "auto", "localization_weight": 0.1, "train_batch_size": 2},
    "eraser_on_noise": {
        "latents_source": "noise", "train_batch_size": 4, "preserved_share": 1 / 3, "on_policy_share": 0.5,
        "on_policy_every": 2, "localization_weight": 0.0, "adversarial_share": 0.5, "adversarial_every": 1,
        "adversarial_steps": 2,
    },
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "golden_noise_model": {"use_ema": True},
    "npnet": {},
    "transformer": {"dropout": 0.0},
    "rnn": {"dropout": 0.0},
}
SUBJECTS: dict[str, dict[str, Any]] = {
    "subject": {"with_prior_preservation": True, "class_prompt": "a white three", "num_class_images": 2},
    "subject_of_sizes": {"aspect_buckets": True, "train_batch_size": 4},
}


def erasers(folder: Path) -> dict[str, tuple[str, list[str]]]:
    files = write_eraser_files(folder, tiny_wan_pipeline())
    return {
        name: ("diffusers_ext.training.eraser.run", eraser_line(files, folder / name, **SHORT, **CLIP, **more))
        for name, more in ERASERS.items()
    }


def networks(folder: Path) -> dict[str, tuple[str, list[str]]]:
    sets = {steps: write_noises(folder / f"noises_{steps}", steps, facts={}) for steps in (1, 3)}
    found = {}
    for name, more in NETWORKS.items():
        data = sets[1 if script_of(name) is train_npnet else 3]
        found[name] = ("diffusers_ext.training.noise", noise_line(name, data, folder / name, **SHORT, **more))
    prompts = write_prompts(folder / "known.txt")
    by_reward = {
        "objective": "reward", "prompt_file": prompts, "num_inference_steps": 1,
        "reward": "tests.training.stub_rewards:DifferentiableBrightness", "train_batch_size": 4,
    }  # fmt: skip
    line = noise_line("golden_noise_model", None, folder / "by_reward", **SHORT, **by_reward)
    found["by_reward"] = ("diffusers_ext.training.noise", line)
    guarded = {"noise_model": guarded_network(folder / "network"), "dataset_dir": judged_pairs(folder / "judged")}
    line = command_line(output_dir=folder / "guard", **SHORT, **guarded, bands=4, width=16, num_layers=1, num_heads=2,
                        train_batch_size=8)  # fmt: skip
    found["guard"] = ("diffusers_ext.training.guard", line)
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, line_to, server) -> dict[str, tuple[str, list[str]]]:
    """All jobs, run in the same two processes with half of each batch."""
    folder = tmp_path_factory.mktemp("jobs")
    found = erasers(folder) | networks(folder)
    for name, more in SUBJECTS.items():
        pictures = {"instance_data_dir": pictures_of_sizes(folder / "pictures")} if "aspect_buckets" in more else {}
        line = line_to(folder / name, **SHORT, **more, **pictures, class_data_dir=folder / "class")
        found[name] = ("diffusers_ext.training.nullspace.run", line)
    halved = [(module, in_two(line)) for module, line in found.values()]
    (folder / "jobs.json").write_text(json.dumps(halved))
    code = JOBS.format(jobs=str(folder / "jobs.json"))
    server.run(code, {module for module, _ in found.values()}, processes=2)
    return found


def pictures_of_sizes(folder: Path) -> Path:
    """Two tall pictures and two square ones."""
    folder.mkdir()
    for number, size in enumerate([(24, 40), (32, 32)] * 2):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    return folder


def in_two(line: list[str]) -> list[str]:
    """A command line for two processes, into a folder of its own."""
    line = list(line)
    batch = line.index("--train_batch_size") + 1
    line[batch] = str(int(line[batch]) // 2)
    line[line.index("--output_dir") + 1] += "_two"
    return line


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", [*ERASERS, *NETWORKS, "by_reward", "guard", *SUBJECTS])
def test_two_processes_train_what_one_does(jobs, name, monkeypatch):
    # The same global generators would drop other samples of half a batch.
    for layer in (SwinDropPath, DropPath):  # as from transformers 5.9 on, and before
        monkeypatch.setattr(layer, "forward", lambda self, x: x)
    module, line = jobs[name]
    run = import_module(module)
    alone = Path(run.main(run.parse_args(line)))
    both = alone.with_name(f"{alone.name}_two")
    weights = sorted(path.relative_to(alone) for path in alone.glob("*.safetensors"))
    assert weights
    for path in weights:
        found, expected = (load_file(folder / path) for folder in (both, alone))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-4, msg=key)
    reports = [json.loads((folder / "training_report.json").read_text()) for folder in (both, alone)]
    assert reports[0].get("prompts") == reports[1].get("prompts")
    losses = [torch.tensor([row["loss"] for row in report["history"]]) for report in reports]
    assert len(losses[0]) == 3
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)

"""The training script under `accelerate launch` with two processes on the CPU."""

from __future__ import annotations

import json
import os

import torch
from safetensors.torch import load_file

from examples.digits.check_model import load_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.training.eraser_runs import eraser_line, train, write_eraser_files
from tests.training.script_runs import REPOSITORY, launch

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


def test_two_processes_train_the_eraser_of_one(tmp_path):
    """Each has half of a batch; the anchor and the heads of the masks are those of the first."""
    files = write_eraser_files(tmp_path, tiny_wan_pipeline())
    recipe = {
        "anchor_concept": "auto",
        "localization_weight": 0.1,
        "num_inference_steps": 2,
        "max_train_steps": 3,
        "logging_steps": 1,
        **dict(zip(("num_frames", "height", "width"), (5, 32, 32))),
    }
    alone = train(files, tmp_path / "alone", **recipe)
    launch("train_eraser", eraser_line(files, tmp_path / "both", **recipe, train_batch_size=1), processes=2)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "both", alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    reports = [json.loads((folder / "training_report.json").read_text()) for folder in (tmp_path / "both", alone)]
    assert reports[0]["prompts"] == reports[1]["prompts"]
    losses = [torch.tensor([row["loss"] for row in report["history"]]) for report in reports]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-4)

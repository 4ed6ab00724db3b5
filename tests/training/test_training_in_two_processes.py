"""The training script under `accelerate launch` with two processes on the CPU."""

from __future__ import annotations

import json
import os
import shutil

import torch
from safetensors.torch import load_file

from examples.digits.check_model import load_pipeline
from tests.training.script_runs import REPOSITORY, launch


DRIVER = """
import sys

sys.path.insert(0, {repository!r})
import torch
from training.loop import TrainingLoop
from training.train_nullspace_dreambooth import main, parse_args

run = TrainingLoop.run

def run_and_keep(loop):
    model = run(loop)
    weights = {{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}
    torch.save(weights, {folder!r} + f"/rank_{{loop.accelerator.process_index}}.pt")
    return model

TrainingLoop.run = run_and_keep
main(parse_args(sys.argv[1:]))
"""


def test_two_processes_train_one_model_and_resume_it(subject_line, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(repository=str(REPOSITORY), folder=str(tmp_path)))
    script = os.path.relpath(driver.with_suffix(""), REPOSITORY / "training")
    run = {
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.3,
        "checkpointing_steps": 2,
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a white three",
        "num_class_images": 2,
        "validation_prompt": "a red seven",
    }
    launch(script, subject_line("whole", **run), processes=2)
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
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", resumed / "checkpoint-2")
    line = subject_line("resumed", **run, resume_from_checkpoint="latest")
    launch("train_nullspace_dreambooth", line, processes=2)
    for name in ("pytorch_lora_weights.safetensors", "validation/step-000004-prompt-0.png"):
        assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

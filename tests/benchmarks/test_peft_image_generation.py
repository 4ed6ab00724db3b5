"""PEFT's image generation benchmark from its data to a submission, with tiny weights and a stand-in for its script."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from benchmarks.peft_image_generation import train_and_score
from benchmarks.peft_image_generation.cost import traced
from benchmarks.peft_image_generation.submission import submission
from tests.tiny_current_pipelines import tiny_flux2_pipeline
from tests.training.conftest import reset_accelerator

# Of `results/lora--flux2-klein-default.json` in huggingface/peft, the keys that all results have.
RUN_INFO = {
    "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
}  # fmt: skip
TRAIN_INFO = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
LAST_METRICS = {"step", "test dino_similarity", "drift", "train loss", "train samples"}
# In the place of PEFT's `evaluate.py`, which needs a GPU: it is called as that is and writes what that writes.
EVALUATE = """
import json, pathlib, sys
_, verbose, checkpoint = sys.argv
checkpoint, here = pathlib.Path(checkpoint), pathlib.Path(__file__).parent
defaults = json.loads((here / "default_training_params.json").read_text())
config = json.loads((checkpoint / "adapter_config.json").read_text())
assert verbose == "-v" and (checkpoint / "adapter_model.safetensors").is_file()
result = {
    "run_info": {
        "created_at": "2026-01-01T00:00:00+00:00", "total_time": 5.0, "experiment_name": checkpoint.name,
        "peft_branch": "main", "peft_config": config, "error_msg": "",
        "train_config": {**defaults, **json.loads((checkpoint / "training_params.json").read_text())},
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 0, "accelerator_memory_max": 1, "accelerator_memory_reserved_99th": 0,
        "train_time": 0.0, "file_size": 1, "num_trainable_params": 1, "num_total_params": 1, "status": "success",
        "metrics": [{"test dino_similarity": 0.5, "drift": 0.25, "eval time": 3.0}],
    },
    "meta_info": {"model_info": {"sha": None}},
}
(here / "temporary_results" / "checkpoint--now.json").write_text(json.dumps(result))
"""
PROMPTS = ["a red sks", "a blue sks", "sks in green", "a photo of sks", "a white sks"]


@pytest.fixture(scope="module")
def peft_dir(tmp_path_factory) -> Path:
    """A checkout's folder of the benchmark, whose data set lies beside it."""
    folder = tmp_path_factory.mktemp("image-gen")
    data = folder / "data"
    data.mkdir()
    for index in range(5):
        Image.new("RGB", (40, 32), (50 * index, 0, 0)).save(data / f"{index}.png")
    settings = {
        "model_id": "black-forest-labs/FLUX.2-klein-base-4B", "dataset_id": str(data), "dataset_split": "train",
        "image_column": "image", "instance_prompts": PROMPTS, "valid_size": 1, "test_size": 2, "resolution": 32,
        "batch_size": 1, "seed": 0, "drift_image_prompts": ["An  astronaut riding a horse"],
    }  # fmt: skip
    (folder / "default_training_params.json").write_text(json.dumps(settings))
    (folder / "evaluate.py").write_text(EVALUATE)
    return folder


@pytest.fixture(scope="module")
def submitted(peft_dir, tmp_path_factory) -> Path:
    """The one command, on a tiny model."""
    folder = tmp_path_factory.mktemp("submission")
    tiny_flux2_pipeline().save_pretrained(folder / "base")
    prompts = folder / "known.txt"
    prompts.write_text("a red three\na blue four\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        reset_accelerator()
        path = train_and_score.main([
            "--peft_dir", str(peft_dir), "--output_dir", str(folder), "--model", str(folder / "base"),
            "--knowledge_prompts", str(prompts), "--max_train_steps", "2", "--",
            "--learning_rate", "0.1", "--num_inference_steps", "2", "--logging_steps", "1",
        ])  # fmt: skip
        reset_accelerator()
    return path


def test_a_submission_has_the_benchmarks_format(submitted):
    result = json.loads(submitted.read_text())
    assert submitted.name == "nullspace--flux2-klein-default.json"
    assert (result["run_info"].keys(), result["train_info"].keys()) == (RUN_INFO, TRAIN_INFO)
    (metrics,) = result["train_info"]["metrics"]
    assert metrics.keys() == LAST_METRICS
    assert (metrics["step"], metrics["train samples"], metrics["drift"]) == (2, 2, 0.25)
    assert result["run_info"]["experiment_name"] == "nullspace/flux2-klein-default"
    config = result["run_info"]["train_config"]
    assert (config["max_steps"], config["optimizer_kwargs"]["lr"]) == (2, 0.1)
    assert result["train_info"]["train_time"] > 0
    checkpoint = submitted.parent / "nullspace--flux2-klein-default" / "checkpoint" / "adapter_model.safetensors"
    assert result["train_info"]["file_size"] == checkpoint.stat().st_size


def test_the_training_rows_are_those_of_the_benchmark(submitted, peft_dir):
    np.random.seed(0)  # as `data.py` of the benchmark does it
    indices = np.arange(5)
    np.random.shuffle(indices)
    pictures = submitted.parent / "nullspace--flux2-klein-default" / "pictures"
    written = {int(path.stem): path.read_text().strip() for path in pictures.glob("*.txt")}
    assert written == {int(index): PROMPTS[index] for index in indices[:2]}
    assert all(Image.open(pictures / f"{index:03d}.png").getpixel((0, 0)) == (50 * index, 0, 0) for index in written)


def test_peft_loads_the_checkpoint_as_diffusers_loads_the_lora(submitted):
    folder = submitted.parent / "nullspace--flux2-klein-default"
    stock = tiny_flux2_pipeline()
    stock.load_lora_weights(str(folder / "lora"))
    model = PeftModel.from_pretrained(tiny_flux2_pipeline().transformer, folder / "checkpoint")
    expected = {name: module for name, module in stock.transformer.named_modules() if hasattr(module, "lora_A")}
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == expected.keys() != set()
    moved = 0.0
    for name, module in found.items():
        (adapter,) = module.lora_A
        (other,) = expected[name].lora_A
        update = module.get_delta_weight(adapter)
        assert torch.allclose(update, expected[name].get_delta_weight(other), atol=1e-7)
        moved += update.norm().item()
    assert moved > 0


def test_what_would_spoil_the_score_is_refused(peft_dir, tmp_path):
    prompts = tmp_path / "known.txt"
    prompts.write_text("a red three\nan astronaut riding a horse\n")
    with pytest.raises(ValueError, match="`knowledge_prompts` must hold none of the prompts that drift is measured"):
        train_and_score.main(["--peft_dir", str(peft_dir), "--knowledge_prompts", str(prompts)])
    failed = {"train_info": {"status": "canceled", "metrics": []}, "run_info": {"error_msg": "out of memory"}}
    with pytest.raises(ValueError, match="must score the checkpoint, got status 'canceled' and \\[\\]: out of memory"):
        submission(failed, None, "a/b", tmp_path)


def test_the_preserved_prompts_leave_the_benchmark_alone():
    lines = train_and_score.PRESERVED.read_text().splitlines()[1:]
    assert len(lines) == len({*lines}) == 60
    assert not [line for line in lines if {"cat", "sks"} & {*line.lower().split()}]


def test_the_cost_is_counted_from_the_models_own_operations():
    small = {"num_layers": 1, "num_single_layers": 1}
    call, step = traced(1, trains=False, **small), traced(1, trains=True, **small)

    def flops(trace):
        return sum(count * operation.flops for operation, count in trace.operations.items())

    # A product of every weight of a block with every token of its stream: joint blocks read both streams apart.
    width, image, text = 24 * 128, 32 * 32, 512
    block = 12 * width**2 + 6 * width**2  # attention and gated MLP of ratio 3, in one stream or in one single block
    expected = 2 * block * (image + text) * 2 + 2 * 2 * 2 * width * (image + text) ** 2
    assert flops(call) == pytest.approx(expected, rel=0.35)
    assert 1.4 < flops(step) / flops(call) < 2.1
    saved = traced(1, trains=True, checkpointing=True, **small)
    assert flops(saved) > 1.3 * flops(step)

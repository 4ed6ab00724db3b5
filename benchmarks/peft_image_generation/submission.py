"""A LoRA as a checkpoint of PEFT, and its scores in the format of PEFT's image generation benchmark.

The format is that of `method_comparison/image-gen/results/*.json` in huggingface/peft: `run_info`, `train_info` and
`meta_info`. The benchmark's `evaluate.py` writes all three for a checkpoint; of a training it knows nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from diffusers_ext.families.lora_files import LoraSource, read_lora

CHECKPOINT_NAME = "adapter_model.safetensors"
_SCORES = ("test dino_similarity", "drift")


@dataclass(frozen=True)
class Training:
    """What PEFT's format tells of a training.

    Args:
        seconds: from the first step to the last, with what is measured before.
        peak_memory: bytes that the accelerator reserved at most.
        samples: pictures seen.
        optimizer: `lr` and `weight_decay` of AdamW.
    """

    steps: int
    samples: int
    seconds: float
    peak_memory: int
    loss: float
    optimizer: dict[str, float]
    trainable_parameters: int
    all_parameters: int


def write_peft_checkpoint(
    lora: LoraSource, folder: Path, base_model: str, training_params: Mapping[str, Any]
) -> dict[str, int]:
    """Write a LoRA of a transformer as `PeftModel.from_pretrained` and the benchmark's `evaluate.py` read it.

    Args:
        lora: as in `read_lora`.
        training_params: what differs from the benchmark's `default_training_params.json`.

    Returns:
        `{module: rank}`.
    """
    weights = {key.removeprefix("transformer."): weight for key, weight in read_lora(lora).items()}
    ranks = {
        key.removesuffix(".lora_A.weight"): len(w) for key, w in weights.items() if key.endswith(".lora_A.weight")
    }
    rank = max(ranks.values())
    others = {name: found for name, found in ranks.items() if found != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=others, target_modules=sorted(ranks),
        base_model_name_or_path=base_model,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
    save_file(tensors, folder / CHECKPOINT_NAME, metadata={"format": "pt"})
    (folder / "training_params.json").write_text(json.dumps(training_params, indent=2) + "\n")
    return ranks


def submission(scored: Mapping[str, Any], training: Training, name: str, checkpoint: Path) -> dict[str, Any]:
    """The result of `evaluate.py` with the training in it, under the name of the experiment.

    Raises:
        ValueError: an evaluation without the benchmark's scores.
    """
    found = [metrics for metrics in scored["train_info"]["metrics"] if set(_SCORES) <= metrics.keys()]
    if scored["train_info"]["status"] != "success" or len(found) != 1:
        raise ValueError(
            f"`evaluate.py` must score the checkpoint, got status {scored['train_info']['status']!r} and "
            f"{scored['train_info']['metrics']}: {scored['run_info']['error_msg']}"
        )
    result = copy.deepcopy(dict(scored))
    result["run_info"] |= {"experiment_name": name, "total_time": scored["run_info"]["total_time"] + training.seconds}
    result["train_info"] |= {
        "accelerator_memory_reserved_avg": training.peak_memory,
        "accelerator_memory_max": training.peak_memory,
        "accelerator_memory_reserved_99th": training.peak_memory,
        "train_time": training.seconds,
        "file_size": (checkpoint / CHECKPOINT_NAME).stat().st_size,
        "num_trainable_params": training.trainable_parameters,
        "num_total_params": training.all_parameters,
        "metrics": [
            {
                "step": training.steps,
                **{score: found[0][score] for score in _SCORES},
                "train loss": training.loss,
                "train samples": training.samples,
            }
        ],
    }
    return result


def peak_memory() -> int:
    """Bytes that the accelerator has reserved at most; 0 where there is none."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0

"""Short trainings of tiny golden-noise networks in this process."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from tests.training.script_runs import command_line
from training import train_noise_sequence, train_npnet

STRUCTURES: dict[str, dict[str, Any]] = {
    "golden_noise_model": {"patch_size": 2, "width": 32, "num_layers": 2, "num_heads": 2},
    "npnet": {
        "svd_num_heads": 2, "svd_hidden_dim": 16, "svd_output_dim": 32, "swin_image_size": 32,
        "swin_patch_size": 2, "swin_embed_dim": 8, "swin_depths": [1, 1],
        "swin_num_heads": [1, 2], "swin_window_size": 4,
    },
    "transformer": {
        "patch_size": 2, "d_model": 32, "nhead": 2, "num_encoder_layers": 1,
        "num_decoder_layers": 2, "dim_feedforward": 64,
    },
    "rnn": {
        "cnn_base_filters": 8, "cnn_num_blocks": [1, 1], "cnn_feat_dim": 16,
        "gru_hidden_size": 16, "gru_num_layers": 1, "num_attention_heads": 2,
        "num_attention_layers": 1,
    },
}  # fmt: skip
RATES = {"golden_noise_model": 5e-3, "npnet": 3e-3, "transformer": 5e-3, "rnn": 1e-2}


def script_of(model: str) -> ModuleType:
    return train_npnet if model in ("npnet", "golden_noise_model") else train_noise_sequence


def noise_line(model: str, dataset_dir: Path, output_dir: Path, **arguments: Any) -> list[str]:
    """Command line of a short training of a tiny network; `None` takes an argument away."""
    usual = {
        "model": model,
        "dataset_dir": dataset_dir,
        "output_dir": output_dir,
        "learning_rate": RATES[model],
        "train_batch_size": 8,
        "max_train_steps": 4,
        "validation_split": 0.25,
        **STRUCTURES[model],
    }
    return command_line(**{**usual, **arguments})


def train(model: str, dataset_dir: Path, output_dir: Path, **arguments: Any) -> Path:
    """Run a training script; returns the folder it wrote."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = script_of(model)
    line = noise_line(model, dataset_dir, output_dir, **arguments)
    return script.main(script.parse_args(line))


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_report.json").read_text())

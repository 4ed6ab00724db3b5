"""Options of the training script, each in a real short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.training.nullspace.run import main, parse_args
from examples.digits.check_model import load_pipeline
from tests.training.conftest import reset_accelerator

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def usual(line_to, tmp_path_factory) -> Path:
    """The folder of a run without options."""
    reset_accelerator()
    folder = main(parse_args(line_to(tmp_path_factory.mktemp("usual") / "out")))
    reset_accelerator()
    return folder


def lora(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA)


def difference(first, second) -> float:
    """Largest difference between two LoRAs, relative to the largest weight."""
    a, b = lora(first), lora(second)
    assert a.keys() == b.keys()
    largest = max(tensor.abs().max() for name, tensor in a.items() if "lora_B" in name)
    return max(((a[name] - b[name]).abs().max() / largest).item() for name in a)


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file, dtype=np.float32)


def history(folder) -> list[dict]:
    return json.loads((folder / "training_report.json").read_text())["history"]


def test_the_same_command_gives_the_same_bits(teach, usual):
    first, second = teach("first", lora_dropout=0.3), teach("second", lora_dropout=0.3)
    assert (first / LORA).read_bytes() == (second / LORA).read_bytes()
    assert difference(first, teach("other_seed", lora_dropout=0.3, seed=1)) > 1e-2
    assert difference(first, usual) > 1e-2


def test_gradient_checkpointing_changes_nothing_but_the_memory(teach, usual):
    assert difference(usual, teach("saving", gradient_checkpointing=True)) < 1e-3


@pytest.mark.parametrize(
    "option",
    [
        {"snr_gamma": 0.5},
        {"random_flip": True},
        {"no_center_crop": True, "resolution": 24},
        {"gradient_accumulation_steps": 2},
        {"lr_scheduler": "cosine"},
        {"max_grad_norm": 1e-4, "adam_epsilon": 1e-2},
        {"negative_prompt": "a green one"},
        {"features": ["k"], "cross_attention_layers": [0, 3]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_has_an_effect(teach, usual, option):
    usual, changed = lora(usual), lora(teach("changed", **option))
    if "features" in option:
        assert len(changed) == 2 * 2
        assert all("to_k" in name for name in changed)
    else:
        assert changed.keys() == usual.keys()
        assert any(not torch.equal(changed[name], usual[name]) for name in usual)
    assert load_pipeline().load_lora_weights(changed) is None


def test_accumulation_takes_one_optimizer_step_per_counted_step(teach):
    folder = teach(gradient_accumulation_steps=3, max_train_steps=2, logging_steps=1)
    assert [row["step"] for row in history(folder)] == [1, 2]


def test_q_and_out_are_trained_along_trajectories(teach):
    folder = teach(features=["q", "k", "v", "out"], statistics_batch_size=2, max_train_steps=2)
    assert len(lora(folder)) == 2 * 28


def test_prior_preservation_draws_what_is_missing_and_learns_from_it(teach, tmp_path):
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a white three",
        "num_class_images": 3,
    }
    drawn = teach("drawn", **prior)
    files = sorted((tmp_path / "class").iterdir())
    assert [path.name for path in files] == [f"class_0000{i}.png" for i in range(3)]
    contents = [path.read_bytes() for path in files]
    assert all(pixels(path).shape == (32, 32, 3) for path in files)
    losses = history(drawn)[-1]
    assert losses["loss"] == pytest.approx(losses["instance"] + losses["prior"], rel=1e-5)
    files[1].unlink()
    again = teach("again", **prior)
    assert [path.read_bytes() for path in files] == contents
    assert (drawn / LORA).read_bytes() == (again / LORA).read_bytes()
    lighter = teach("lighter", **prior, prior_loss_weight=0.5)
    losses = history(lighter)[-1]
    assert losses["loss"] == pytest.approx(losses["instance"] + 0.5 * losses["prior"], rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_bf16_with_everything_that_draws(teach, tmp_path, full):
    folder = teach(
        mixed_precision="bf16",
        full_finetune=full or None,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a white three",
        num_class_images=2,
        validation_prompt="a red seven",
        num_validation_images=2,
        num_inference_steps=10,
    )
    picture = pixels(folder / "validation" / "step-000004-prompt-0.png")
    expected = np.asarray(load_pipeline()(
        "a red seven", num_inference_steps=10, height=32, width=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0], dtype=np.float32)  # fmt: skip
    assert picture.shape == (32, 64, 3)
    assert np.abs(picture[:, :32] - expected).mean() < 8
    if full:
        assert (folder / "pipeline" / "model_index.json").is_file()
    else:
        assert all(tensor.dtype == torch.float32 for tensor in lora(folder).values())
        assert all(tensor.isfinite().all() for tensor in lora(folder).values())


def test_validation_and_tensorboard(teach):
    folder = teach(
        validation_prompt="a red seven",
        validation_steps=3,
        num_validation_images=3,
        report_to="tensorboard",
        logging_steps=2,
        hub_token="secret-token",
    )
    drawn = sorted(path.name for path in (folder / "validation").iterdir())
    assert drawn == ["step-000003-prompt-0.png", "step-000004-prompt-0.png"]
    assert pixels(folder / "validation" / drawn[0]).shape == (32, 96, 3)
    logs = [path for path in (folder / "logs").rglob("*") if path.is_file()]
    assert any(b"a red seven" in path.read_bytes() for path in logs)
    assert any("tfevents" in path.name for path in logs)
    everything = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(b"secret-token" in path.read_bytes() for path in everything)


def test_pictures_on_the_way_do_not_change_the_training(teach):
    quiet = teach("quiet", lora_dropout=0.3)
    drawing = {"validation_prompt": "a red seven", "validation_steps": 1}
    assert (quiet / LORA).read_bytes() == (teach("drawing", lora_dropout=0.3, **drawing) / LORA).read_bytes()

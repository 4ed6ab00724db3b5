"""The distilled digits: an ordinary folder that draws in one step or two without guidance, and its training script."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

from examples.digits.check_model import draw, load_pipeline
from examples.digits.golden_noise import HELD_OUT_PROMPTS
from examples.digits.judge import DigitsJudge
from examples.digits_distilled import train_model
from examples.digits_distilled.train_model import MODEL_DIR, draw_trajectories


def test_it_loads_and_draws_as_it_is_and_is_small():
    pipeline = DiffusionPipeline.from_pretrained(MODEL_DIR)
    assert type(pipeline) is StableDiffusionPipeline
    assert isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red seven", num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) <= 3_000_000


@pytest.mark.parametrize(("steps", "least"), [(1, 0.7), (2, 0.8), (4, 0.8)])
def test_it_draws_held_out_prompts(steps, least):
    prompts = HELD_OUT_PROMPTS[:100]
    images = draw(load_pipeline(MODEL_DIR), prompts, seed=1, num_inference_steps=steps, guidance_scale=1.0)
    assert DigitsJudge().correct(images, prompts).mean() >= least


def test_points_between_two_steps_lie_on_the_way():
    teacher = load_pipeline()
    runs = draw_trajectories(teacher, ["a red seven"], 2, torch.Generator().manual_seed(0))
    alphas, index = teacher.scheduler.alphas_cumprod, torch.arange(2)
    steps, first = torch.zeros(2, dtype=torch.long), runs.timesteps[:1].expand(2)
    torch.testing.assert_close(runs.between(index, steps, first, alphas), runs.x_t[:, 0])
    second = runs.timesteps[1:2].expand(2)
    torch.testing.assert_close(runs.between(index, steps, second, alphas), runs.x_t[:, 1], atol=1e-4, rtol=1e-4)
    assert runs.end(index, alphas).shape == (2, 4, 8, 8)


def test_the_script_leaves_a_folder_and_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(train_model, "TRAINING_PROMPTS", ["a red one", "a blue two"])
    train_model.main(["--output_dir", str(tmp_path / "model"), "--runs_per_prompt", "2", "--max_train_steps", "2"])
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "model"), StableDiffusionPipeline)
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert log["arguments"] == {"max_train_steps": "2", "runs_per_prompt": "2", "seed": "0"}

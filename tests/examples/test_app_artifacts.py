"""Which artifacts the app takes: its own, the demo's, or new ones."""

from __future__ import annotations

import pytest

from diffusers_ext import load_noise_model
from examples import app_artifacts
from examples.app_artifacts import DEMO_FOLDERS, find_or_make
from examples.digits import golden_noise
from tests.evaluation.golden_subjects import small_network


def test_what_the_demo_or_the_app_made_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(app_artifacts, "_make_network", None)
    demo, own = tmp_path / "demo", tmp_path / "app"
    small_network().save_pretrained(demo / DEMO_FOLDERS["noise_model"])
    assert find_or_make("noise_model", own, demo) == demo / "golden_noise" / "network"
    small_network().save_pretrained(own / "noise_model")
    assert find_or_make("noise_model", own, demo) == own / "noise_model"


def test_a_missing_network_is_trained_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(app_artifacts, "_NETWORK_STEPS", 1)
    monkeypatch.setattr(app_artifacts, "_NOISES_PER_PROMPT", 2)
    monkeypatch.setattr(golden_noise, "TRAINING_PROMPTS", golden_noise.TRAINING_PROMPTS[:6])
    folder = find_or_make("noise_model", tmp_path, tmp_path / "demo")
    assert load_noise_model(folder).config.in_channels == 4
    monkeypatch.setattr(app_artifacts, "_make_network", None)
    assert find_or_make("noise_model", tmp_path, tmp_path / "demo") == folder
    assert [path.name for path in tmp_path.iterdir()] == ["noise_model"]


def test_a_training_that_fails_leaves_nothing_to_be_taken(tmp_path, monkeypatch):
    def killed(folder):
        (folder / "lora").mkdir()
        (folder / "lora" / "part.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(app_artifacts, "_make_lora", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            find_or_make("lora", tmp_path, tmp_path / "demo")
    assert not (tmp_path / "lora").exists()

from __future__ import annotations

import importlib.metadata
import sys
import types
import warnings

import pytest
import torch
from PIL import Image

from diffusers_ext.rewards import HPSv2PackageReward, HPSv2Reward


RED, GREEN = Image.new("RGBA", (6, 4), (255, 0, 0, 255)), Image.new("RGB", (4, 4), (0, 128, 0))


@pytest.fixture
def package(monkeypatch):
    """A stand-in with the package's interface; it scores by a picture's red and green."""
    calls = []

    def score(img_path, prompt, cp=None, hps_version="v2.0"):
        calls.append({"modes": [i.mode for i in img_path], "prompt": prompt, "cp": cp})
        calls[-1]["version"] = hps_version
        channel = "red green".split().index(prompt)
        return [torch.tensor(i.getpixel((0, 0))[channel] / 256).numpy() for i in img_path]

    module = types.ModuleType("hpsv2.img_score")
    module.score, module.device, module.calls = score, "cpu", calls
    monkeypatch.setitem(sys.modules, "hpsv2", types.ModuleType("hpsv2"))
    monkeypatch.setitem(sys.modules, "hpsv2.img_score", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0")
    return module


def test_pictures_are_scored_by_prompt_and_come_back_in_order(package):
    reward = HPSv2PackageReward(version="v2.1")
    scores = reward.score([RED, GREEN, GREEN, RED], ["red", "green", "red", "green"])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [255 / 256, 0.5, 0, 0]
    assert package.calls == [
        {"modes": ["RGB", "RGB"], "prompt": prompt, "cp": None, "version": "v2.1"}
        for prompt in ("red", "green")
    ]
    assert (reward.name, reward.version) == ("hpsv2", "v2.1+hpsv2-1.2.0")


def test_the_backend_is_an_explicit_choice(package, hpsv2_folder, caplog):
    reward = HPSv2Reward.from_pretrained(hpsv2_folder, version="v2.0", backend="hpsv2")
    assert isinstance(reward, HPSv2PackageReward)
    assert reward.score([RED], ["red"]).tolist() == [255 / 256]
    assert package.calls[0]["cp"] == str(hpsv2_folder / "HPS_v2_compressed.pt")
    assert package.calls[0]["version"] == "v2.0"
    assert "reads its checkpoint anew for every distinct prompt" in caplog.text


def test_another_device_than_the_packages_is_refused(package, hpsv2_folder):
    with pytest.raises(ValueError, match="`device` must be 'cpu' with `backend='hpsv2'`"):
        HPSv2Reward.from_pretrained(hpsv2_folder, backend="hpsv2", device="cuda")


def test_wrong_pairs_versions_and_nan_are_refused(package, monkeypatch):
    with pytest.raises(ValueError, match="`version` must be one of"):
        HPSv2PackageReward(version="v3")
    reward = HPSv2PackageReward()
    with pytest.raises(ValueError, match=r"one prompt per image \(1\)"):
        reward.score([RED], ["red", "green"])
    monkeypatch.setattr(package, "score", lambda *_, **__: [float("nan")])
    with pytest.raises(ValueError, match="must be numbers, got nan for 1 of 1"):
        reward.score([RED], ["red"])


@pytest.mark.parametrize("error", [ImportError, FileNotFoundError, AttributeError])
def test_an_absent_or_broken_package_is_an_error_with_a_remedy(monkeypatch, error):
    def import_module(name):
        raise error("bpe_simple_vocab_16e6.txt.gz")

    monkeypatch.setattr(
        "diffusers_ext.rewards.hpsv2_package.importlib.import_module", import_module
    )
    with pytest.raises(ImportError, match=f"{error.__name__}: bpe_simple_vocab.*transformers'"):
        HPSv2PackageReward()


def test_the_packages_warning_filter_does_not_stay(monkeypatch):
    module = types.ModuleType("hpsv2.img_score")
    module.device = "cpu"

    def import_module(name):
        warnings.filterwarnings("ignore", category=UserWarning)
        return module

    monkeypatch.setattr(
        "diffusers_ext.rewards.hpsv2_package.importlib.import_module", import_module
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0")
    before = list(warnings.filters)
    HPSv2PackageReward()
    assert warnings.filters == before

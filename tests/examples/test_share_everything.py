"""Everything is pushed to a Hub and comes back the same."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import FeatureStatistics, collect_statistics, save_eraser, save_lora
from examples.share_everything import main
from tests.evaluation.golden_subjects import small_network
from tests.golden_noise.pair_sets import write_set
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_erasers import add_random_eraser
from tests.tiny_lora import add_random_lora

WEIGHTS = {
    "lora": "pytorch_lora_weights.safetensors",
    "network": "diffusion_pytorch_model.safetensors",
    "eraser": "adapter_model.safetensors",
}


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """The command line for everything, made with random numbers."""
    pictures, clips = random_digits_pipeline(), tiny_video_pipeline()
    pictures.save_pretrained(tmp_path / "pictures")
    clips.save_pretrained(tmp_path / "clips")
    collect_statistics(pictures, ["a red seven"]).save_pretrained(tmp_path / "statistics")
    add_random_lora(pictures.unet)
    save_lora(type(pictures), pictures.unet, tmp_path / "lora")
    add_random_eraser(clips.transformer)
    save_eraser(clips, tmp_path / "eraser", concept="seven", anchor_concept="digit")
    small_network().save_pretrained(tmp_path / "network")
    write_set(tmp_path / "pairs")
    given = {"model": "pictures", "video_model": "clips", "noise_model": "network"}
    given |= {name: name for name in ("statistics", "lora", "eraser", "pairs")}
    return [
        *(f"--{name}={tmp_path / value}" for name, value in given.items()), "--user", "tester",
        "--license", "mit", "--trained_on", "Random numbers.", "--instance_prompt", "a sks",
        "--reward", "none", "--preserved_concepts", "one", "two",
    ]  # fmt: skip


def test_all_of_it_is_shared_with_cards_and_comes_back(hub, arguments, tmp_path, capsys):
    loaded = main(arguments)
    names = ["statistics", "lora", "network", "pairs", "eraser"]
    assert list(loaded) == [f"tester/{name}" for name in names]
    for name in names:
        kind = "dataset" if name == "pairs" else "model"
        files = hub.files(f"tester/{name}", repo_type=kind)
        assert b"license: mit" in files["README.md"]
        if name in WEIGHTS:
            assert files[WEIGHTS[name]] == (tmp_path / name / WEIGHTS[name]).read_bytes()
    before = FeatureStatistics.from_pretrained(tmp_path / "statistics")
    [(_, moment)] = loaded["tester/statistics"].moments.items()
    assert torch.equal(moment.mean, before.moments["text"].mean)
    assert len(loaded["tester/pairs"]) == 6
    assert loaded["tester/network"].config.in_channels == 4
    assert loaded["tester/eraser"] == "default"
    assert capsys.readouterr().out.count("/commit/") == 5


def test_only_what_is_given_is_shared(hub, arguments):
    kept = [a for a in arguments if not a.startswith(("--lora", "--eraser", "--pairs", "--stat"))]
    assert list(main(kept)) == ["tester/network"]
    assert [name for name in hub.repos if "tester" in str(name)] == list(hub.repos)
    assert len(hub.repos) == 1


def test_a_missing_fact_stops_before_anything_is_uploaded(hub, arguments):
    place = arguments.index("--instance_prompt")
    kept = [a for a in arguments[:place] + arguments[place + 2 :] if not a.startswith("--stat")]
    with pytest.raises(ValueError, match="`instance_prompt` must be given"):
        main(kept)
    assert not hub.repos

"""All of golden noise with models whose text a large language model writes, from pairs to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.npnet import refuse_npnet
from diffusers_ext.golden_noise.pairs.dataset import open_pairs, source_noise
from diffusers_ext.training import pairs as generate_npd
from diffusers_ext.training.golden_noise import rendering as sample_golden_noise
from tests.golden_noise.golden_pipelines import FAMILIES
from tests.training.conftest import reset_accelerator
from tests.training.noise_runs import read_report, train
from tests.training.pair_runs import BRIGHTNESS, write_prompt_file
from tests.training.script_runs import command_line
from training import evaluate_golden_noise

PROMPTS = ("a red seven", "a photo of a blue three and a green two", "a one", "a yellow nine and a red one")
# As of base models and of Z-Image-Turbo.
GUIDANCE = {"flux2_dev": 4.0, "qwen_image": 4.0, "z_image": 0.0}
# The code of the others is the same for all.
SEQUENCE_NETWORKS = {"flux2_dev": "transformer", "qwen_image": "rnn", "z_image": "transformer"}
SIZE = {"num_inference_steps": 2, "height": 32, "width": 32}


def run(script: Any, base: Path, **arguments: Any) -> Any:
    reset_accelerator()
    try:
        return script.main(script.parse_args(command_line(pretrained_model_name_or_path=base, **arguments)))
    finally:
        reset_accelerator()


@pytest.fixture(scope="module", params=GUIDANCE)
def made(request, tmp_path_factory) -> tuple[str, Path]:
    """A family's model, stored in bfloat16, with a set of sequences in `pairs`; rejected ones are kept."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].plain().to(torch.bfloat16).save_pretrained(folder / "base")
    prompt_file, guidance = write_prompt_file(folder / "prompts.txt", PROMPTS), GUIDANCE[request.param]
    run(
        generate_npd, folder / "base", prompt_file=prompt_file, output_dir=folder / "pairs", output_size=32,
        num_steps=2, margin=-1000, batch_size=3, num_inference_steps=2, guidance_scale=guidance, reward=BRIGHTNESS,
    )  # fmt: skip
    return request.param, folder


@pytest.mark.parametrize("kind", ["pairs", "sequences"])
def test_networks_learn_from_prompts_of_different_lengths(made, kind, tmp_path):
    family, folder = made
    model = SEQUENCE_NETWORKS[family] if kind == "sequences" else "golden_noise_model"
    pairs = open_pairs(folder / "pairs")
    assert sorted(pairs.prompts) == sorted(PROMPTS)
    patch = {} if not family.startswith("flux2") or model == "rnn" else {"patch_size": 1}
    out = train(
        model, folder / "pairs", tmp_path / "network", pretrained_model_name_or_path=folder / "base",
        text_batch_size=1, max_train_steps=2, **patch,
    )  # fmt: skip
    network = load_noise_model(out)
    assert network.config.in_channels == pairs.latent_shape[0] == (16 if family.startswith("flux2") else 4)
    assert read_report(out)["text"]["text_embed_dim"] == network.config.text_embed_dim
    if model == "golden_noise_model":
        check_pictures(family, folder / "base", out, tmp_path)
        check_figures(family, folder, out, tmp_path)


def check_pictures(family: str, base: Path, network: Path, tmp_path: Path) -> None:
    """The script's pictures are the pipeline's."""
    drawn = run(
        sample_golden_noise, base, noise_model=network, prompt=PROMPTS[1], seed=7, generate_standard=True,
        guidance_scale=GUIDANCE[family], output_dir=tmp_path / "out", **SIZE,
    )  # fmt: skip
    pictures = {path.name: np.asarray(Image.open(path)) / 255 for path in drawn}
    pipeline = FAMILIES[family].golden.from_pretrained(base, dtype=torch.float32)
    pipeline.load_noise_model(network)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": ""}}
    noise = source_noise(7, (pipeline.noise_model.config.in_channels, 8, 8))[None]
    latents = pipeline._pack_latents(noise, *noise.shape) if family == "qwen_image" else noise
    for name, scale in (("seed_7_golden.png", 1.0), ("seed_7_standard.png", 0.0)):
        expected = pipeline(
            prompt=PROMPTS[1], golden_noise_scale=scale, latents=latents, output_type="np", **SIZE,
            **guided.get(family, {"guidance_scale": GUIDANCE[family]}), **FAMILIES[family].call,
        ).images[0]  # fmt: skip
        assert np.abs(pictures[name] - expected).max() < 0.02, name


def check_figures(family: str, folder: Path, network: Path, tmp_path: Path) -> None:
    """The network and the target itself, beside random noise."""
    negative = {} if family in ("flux2_dev", "z_image") else {"negative_prompt": "a green one"}
    report = run(
        evaluate_golden_noise, folder / "base", noise_model=network, prompt_file=folder / "prompts.txt",
        max_prompts=2, target_steps=1, best_of=2, num_images_per_prompt=2, reward=BRIGHTNESS,
        guidance_scale=GUIDANCE[family], output_dir=tmp_path / "table", **SIZE, **negative,
    )  # fmt: skip
    assert report.noise.keys() == {"standard", "network", "1-step target"}
    assert all(report.noise[side]["change"] > 0 for side in ("network", "1-step target"))
    assert len(report.rows) == 4


def test_npnet_is_refused_by_name_where_it_does_not_fit(made, tmp_path):
    family, folder = made
    if family.startswith("flux2"):  # whose tiny one has a square number of channels
        with pytest.raises(ValueError, match="must be none of NPNet for FLUX.2, whose latents have 128 channels"):
            refuse_npnet(find_family("Flux2KleinPipeline"), 128)
        return
    with pytest.raises(ValueError, match="must be none of NPNet for .*-Image, whose texts are as long as"):
        train("npnet", folder / "pairs", tmp_path / "network", pretrained_model_name_or_path=folder / "base")

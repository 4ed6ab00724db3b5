from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from diffusers_ext.training.golden_noise import rendering as script
from examples.digits.check_model import load_pipeline
from tests.evaluation.golden_subjects import small_network
from tests.training.script_runs import command_line

PROMPT = "a red nine"


def run(tmp_path, *further: str) -> dict[str, np.ndarray]:
    line = [*command_line(), "--noise_model", str(tmp_path / "network"), "--prompt", PROMPT,
            "--num_inference_steps", "2", "--guidance_scale", "1.5",
            "--output_dir", str(tmp_path / "out"), *further]  # fmt: skip
    written = script.main(script.parse_args(line))
    return {path.name: np.asarray(Image.open(path)) for path in written}


def test_pictures_are_those_of_the_pipeline(tmp_path, fresh_accelerator):
    small_network().save_pretrained(tmp_path / "network")
    pictures = run(tmp_path, "--seed", "7", "--generate_standard", "--num_images_per_prompt", "2")
    assert list(pictures) == [
        "seed_7_golden.png", "seed_7_standard.png", "seed_8_golden.png", "seed_8_standard.png",
    ]  # fmt: skip
    pipeline = GoldenNoisePipeline.from_pipe(load_pipeline())
    pipeline.set_noise_model(load_noise_model(tmp_path / "network"))
    pipeline.set_progress_bar_config(disable=True)
    for name, scale in (("seed_8_golden.png", 1), ("seed_8_standard.png", 0)):
        expected = pipeline(
            PROMPT, num_inference_steps=2, guidance_scale=1.5, golden_noise_scale=scale,
            latents=source_noise(8, (4, 8, 8))[None], height=32, width=32, output_type="np",
        ).images[0]  # fmt: skip
        assert np.abs(pictures[name] / 255 - expected).max() < 0.02
    assert not np.array_equal(pictures["seed_7_golden.png"], pictures["seed_7_standard.png"])


def test_a_file_that_is_none_is_named_before_anything_is_drawn(tmp_path, fresh_accelerator):
    with pytest.raises(ValueError, match="gone.pth must be a file"):
        run(tmp_path, "--npnet_weights_path", str(tmp_path / "gone.pth"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`golden_noise_scale` must be a finite number, got nan"):
        run(tmp_path, "--golden_noise_scale", "nan")

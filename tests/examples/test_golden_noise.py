from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from examples.digits.check_model import MODEL_DIR, load_pipeline
from examples.golden_noise import main
from tests.evaluation.golden_subjects import small_network


def test_the_pair_is_random_noise_and_golden_noise_of_one_seed(tmp_path):
    small_network().save_pretrained(tmp_path / "network")
    output = tmp_path / "new" / "pair.png"
    prompt = "a red seven"
    main(
        ["--pretrained_model_name_or_path", str(MODEL_DIR), "--seed", "3", "--prompt", prompt,
         "--noise_model", str(tmp_path / "network"), "--num_inference_steps", "3",
         "--guidance_scale", "1.5", "--output", str(output)]
    )  # fmt: skip
    pair = np.asarray(Image.open(output))
    assert pair.shape == (32, 64, 3)
    plain = load_pipeline()(
        prompt,
        num_inference_steps=3,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(3),
    )
    assert np.array_equal(pair[:, :32], np.asarray(plain.images[0]))
    assert np.abs(pair[:, 32:].astype(int) - pair[:, :32]).mean() > 1

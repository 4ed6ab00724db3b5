from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_ext.training.nullspace.run import Validation, parse_args
from examples.digits.check_model import load_pipeline


@pytest.fixture
def make_args(subject_line):
    def make(**arguments) -> argparse.Namespace:
        arguments = {"validation_prompt": "a red seven", "num_validation_images": 2, **arguments}
        return parse_args(subject_line(**arguments))

    return make


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture
def validation(make_args, pipeline, fresh_accelerator):
    return Validation(make_args(), pipeline, Accelerator(cpu=True))


def read(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def test_pictures_have_fixed_seeds(validation, tmp_path):
    validation.draw(3)
    torch.randn(5)
    validation.draw(7)
    names = ["step-000003-prompt-0.png", "step-000007-prompt-0.png"]
    folder = tmp_path / "out" / "validation"
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert validation.files == [folder / names[1]]
    first, second = (read(folder / name) for name in names)
    assert first.shape == (32, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first[:, :32], first[:, 32:])


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(validation, pipeline, monkeypatch, broken):
    pipeline.unet.train()
    pipeline.unet.up_blocks.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    state = torch.get_rng_state()
    seen = []
    hook = pipeline.unet.conv_in.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        if broken:
            monkeypatch.setattr(pipeline.vae, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                validation.draw(1)
        else:
            validation.draw(1)
    finally:
        hook.remove()
        restored = [module.training for module in pipeline.unet.modules()]
        pipeline.unet.eval()
    assert not any(seen)
    assert restored == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_tensorboard_gets_the_pictures(validation):
    added = []
    writer = SimpleNamespace(add_images=lambda *args, **options: added.append((args, options)))
    validation.accelerator.trackers = [
        SimpleNamespace(name="tensorboard", writer=writer),
        SimpleNamespace(name="other"),
    ]
    validation.draw(9)
    ((name, stacked, step), options) = added[0]
    assert (name, step, options) == ("a red seven", 9, {"dataformats": "NHWC"})
    assert stacked.shape == (2, 32, 32, 3)
    assert np.array_equal(np.concatenate(stacked, axis=1), read(validation.files[0]))

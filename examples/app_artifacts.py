"""The LoRA, the network and the eraser that the app shows on the bundled models: the demo's, or made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusers_ext.eraser.files import save_eraser
from examples.digits.golden_noise import make_pairs, train_network
from examples.digits.subjects import NULL_SPACE_FLAGS, train_subject
from examples.moving_digits.check_model import load_pipeline as load_video_pipeline
from examples.moving_digits.erasers import RECIPE, train_digits_eraser

GLYPH, ERASED = "triangle", "three"
# Less than in the full trainings, which the benchmarks run: a minute each on one core.
_ERASER_RECIPE = replace(RECIPE, max_train_steps=300, num_target_trajectories=48, num_preserved_trajectories=96)
_NOISES_PER_PROMPT, _NETWORK_STEPS = 4, 400
# Where `examples/demo.py` leaves each, below its output folder.
DEMO_FOLDERS = {"lora": "new_glyph/null-space_LoRA", "noise_model": "golden_noise/network", "eraser": "eraser/eraser"}


def find_or_make(name: str, output_dir: str | Path, demo_dir: str | Path = "outputs/demo") -> Path:
    """The folder of one artifact for the bundled models; trains it where there is none yet.

    Args:
        name: `"lora"`, `"noise_model"` or `"eraser"`.
        output_dir: of the app; what is trained stays there.
        demo_dir: of an earlier demo.
    """
    for folder in (Path(output_dir, name), Path(demo_dir, DEMO_FOLDERS[name])):
        if any(folder.glob("*.safetensors")):  # written last
            return folder
    makers: dict[str, Callable[[Path], Path]] = {
        "lora": _make_lora,
        "noise_model": _make_network,
        "eraser": _make_eraser,
    }
    # What a killed training has left must not be taken for the whole.
    staging = Path(output_dir, f".{name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    made = makers[name](staging)
    shutil.rmtree(Path(output_dir, name), ignore_errors=True)
    made.rename(Path(output_dir, name))
    shutil.rmtree(staging)
    return Path(output_dir, name)


def _make_lora(folder: Path) -> Path:
    return train_subject(folder, "lora", GLYPH, NULL_SPACE_FLAGS)


def _make_network(folder: Path) -> Path:
    pairs = make_pairs(folder / "pairs", num_steps=1, noises_per_prompt=_NOISES_PER_PROMPT)
    return train_network("GoldenNoiseModel", pairs, folder / "network", steps=_NETWORK_STEPS)


def _make_eraser(folder: Path) -> Path:
    pipeline = load_video_pipeline()
    train_digits_eraser(pipeline, ERASED, recipe=_ERASER_RECIPE)
    save_eraser(pipeline, folder / "eraser")
    return folder / "eraser"

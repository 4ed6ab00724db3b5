"""A concept is erased by an eraser that is trained or given; clips are shown from the same seeds."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_ext import save_eraser
from examples.erase_a_concept import main
from tests.examples.picture_files import read_frames
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser

TRAINING = (
    "--preserved_concepts_file {} --eraser_rank 2 --max_train_steps 2 --train_batch_size 2 "
    "--learning_rate 1e-2 --num_target_trajectories 1 --num_preserved_trajectories 1 "
    "--num_inference_steps 2 --points_per_trajectory 0"
)


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    tiny_video_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    (tmp_path / "prompts.txt").write_text("a red seven moving up\na blue seven moving left\n")
    return [
        "--model", str(tmp_path / "model"), "--concept", "seven", "--num_inference_steps", "2",
        "--prompts_file", str(tmp_path / "prompts.txt"), "--num_prompts", "1",
        "--output_dir", str(tmp_path / "out"), "--others", "a green two moving up",
    ]  # fmt: skip


def test_an_eraser_is_trained_and_shown(arguments, tmp_path):
    main([*arguments, f"--training={TRAINING.format(tmp_path / 'words.txt')}"])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "clips").glob("*.gif"))) == 4


def test_a_given_eraser_is_shown_at_its_strength(arguments, tmp_path):
    pipeline = tiny_video_pipeline()
    add_random_eraser(pipeline.transformer)
    save_eraser(pipeline, tmp_path / "eraser")
    changed = []
    for scale in ("0.0", "1.0"):
        main([*arguments, "--eraser", str(tmp_path / "eraser"), "--scale", scale])
        base, erased = (read_frames(tmp_path / "out" / "clips" / f"1_{side}.gif") for side in ("base", "erased"))
        changed.append(not np.array_equal(base, erased))
    assert changed == [False, True]
    assert (tmp_path / "out" / "clips" / "sheet.png").is_file()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

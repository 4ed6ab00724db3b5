"""An eraser and a LoRA at once: each alone, both, and neither."""

from __future__ import annotations

import itertools

import numpy as np
from diffusers import CogVideoXPipeline
from peft.utils import get_peft_model_state_dict

from diffusers_ext import render_clips, save_eraser
from diffusers_ext.evaluation.report_files import write_clip
from examples.combine_eraser_with_lora import main
from tests.examples.picture_files import read_frames
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser
from tests.tiny_lora import add_random_lora


def test_neither_is_the_base_model_and_the_others_all_differ(tmp_path):
    pipeline, prompt = tiny_video_pipeline(), "a red seven moving up"
    pipeline.save_pretrained(tmp_path / "model")
    base = render_clips(pipeline, [prompt], seeds=[0], num_inference_steps=2, guidance_scale=6.0)
    write_clip(base[0], tmp_path / "base.gif")
    add_random_eraser(pipeline.transformer)
    save_eraser(pipeline, tmp_path / "eraser")
    other = tiny_video_pipeline()
    add_random_lora(other.transformer)
    layers = get_peft_model_state_dict(other.transformer)
    CogVideoXPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    main(
        ["--model", str(tmp_path / "model"), "--lora", str(tmp_path / "lora"), "--prompt", prompt,
         "--eraser", str(tmp_path / "eraser"), "--num_inference_steps", "2",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert (tmp_path / "out" / "neither.gif").read_bytes() == (tmp_path / "base.gif").read_bytes()
    names = ("neither", "LoRA", "eraser", "both")
    frames = [read_frames(tmp_path / "out" / f"{name}.gif") for name in names]
    for first, second in itertools.combinations(frames, 2):
        assert not np.array_equal(first, second)
    assert read_frames(tmp_path / "out" / "sheet.png").shape[1] > 4 * 96

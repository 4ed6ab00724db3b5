from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_ext.evaluation.rendering import render_clips
from tests.tiny_cogvideox import tiny_video_pipeline

CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 2.0}
PROMPTS = ["a red seven", "a blue two", "the red one"]


def test_a_clip_depends_on_its_prompt_and_seed_alone(capsys):
    pipeline = tiny_video_pipeline()
    pipeline.transformer.train()
    scheduler = pipeline.scheduler
    clips = render_clips(pipeline, PROMPTS, seeds=[3, 4, 5], batch_size=2, **CALL)
    assert (clips.shape, clips.dtype) == ((3, 9, 16, 16, 3), np.uint8)
    assert "draw: 100%" in capsys.readouterr().err
    alone = render_clips(pipeline, PROMPTS[2:], seeds=[5], show_progress=False, **CALL)
    assert np.abs(alone[0].astype(int) - clips[2]).max() <= 1
    other = render_clips(pipeline, PROMPTS[2:], seeds=[6], show_progress=False, **CALL)
    assert np.abs(other[0].astype(int) - clips[2]).max() > 5
    assert capsys.readouterr().err == ""
    assert pipeline.transformer.training
    assert pipeline.scheduler is scheduler


def test_the_text_has_the_length_that_the_transformer_was_made_for():
    pipeline = tiny_video_pipeline()
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    for given in ({}, {"max_sequence_length": 7}):
        render_clips(pipeline, PROMPTS[:1], seeds=[0], show_progress=False, **CALL, **given)
    assert seen == [pipeline.transformer.config.max_text_seq_length, 7]


def test_bad_input_is_refused():
    pipeline = tiny_video_pipeline()
    for prompts, seeds in (([], []), (PROMPTS, [1])):
        with pytest.raises(ValueError, match="`seeds` must have one entry per prompt"):
            render_clips(pipeline, prompts, seeds=seeds, **CALL)
    pipeline.transformer.proj_out.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="must draw finite clips, got NaN .* 'a red seven'"):
        render_clips(pipeline, PROMPTS, seeds=[1, 2, 3], show_progress=False, **CALL)

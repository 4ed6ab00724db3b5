"""The style LoRA is an ordinary LoRA of CogVideoX."""

from __future__ import annotations

from diffusers_ext import check_loaded_lora
from examples.moving_digits.check_model import load_pipeline
from examples.moving_digits.train_style_lora import main, styled_clips


def test_it_loads_in_stock_diffusers(tmp_path):
    main(["--max_train_steps", "1", "--output_dir", str(tmp_path)])
    pipeline = load_pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert check_loaded_lora(pipeline) == 16


def test_styled_clips_are_blue():
    pipeline = load_pipeline()
    latents, embeds = styled_clips(pipeline)
    frames = pipeline.decode_latents(latents[:4])
    red, _, blue = (frames[:, channel].mean().item() for channel in range(3))
    assert blue > red + 0.05
    assert len(latents) == len(embeds)

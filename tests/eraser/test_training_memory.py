from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.measured_memory import peak_bytes
from diffusers_ext.eraser.batch import EraserText
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.shaped_step import StepShape
from diffusers_ext.eraser.training_memory import step_memory
from tests.tiny_cogvideox import tiny_video_pipeline
from training.eraser_data import ClipSize
from training.eraser_run import EraserData, add_eraser, make_step


LATENTS = (3, 4, 4, 4)
SHAPE = StepShape(LATENTS, rank=8, target_rows=4, preserved_rows=4, dtype=torch.float32)
WIDE = {"num_attention_heads": 4, "num_layers": 4}


def config_of(pipeline):
    return dict(pipeline.transformer.config)


def training_step(pipeline, shape):
    """The step of the training script, over random samples."""
    rows = max(shape.target_rows, shape.preserved_rows)
    weight = 1.0 if shape.localization else 0.0
    recipe = EraserTraining(
        rank=shape.rank,
        train_batch_size=rows,
        localization_weight=weight,
        rows_in_turn=shape.rows_in_turn,
    )
    config = pipeline.transformer.config
    text = torch.randn(3, config.max_text_seq_length, config.text_embed_dim)
    data = EraserData(EraserText(text, text, text, text[0]), None, None, ClipSize(9, 16, 16))
    parameters = add_eraser(pipeline.transformer, recipe)
    if shape.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()
    step = make_step(pipeline, data, recipe, torch.device("cpu"))
    optimizer = torch.optim.AdamW(parameters)
    prompts, t = torch.arange(rows) % 3, torch.arange(rows) * 9

    def latents():
        return torch.randn(rows, *LATENTS)

    def run():
        target = {"x_t": latents(), "t": t, "prompt": prompts}
        target |= {"v_concept": latents(), "v_anchor": latents()}
        if shape.localization:
            target["mask"] = torch.rand(rows, *LATENTS[:1], *LATENTS[2:])
        preserved = {"x_t": latents(), "t": t, "prompt": prompts, "velocity": latents()}
        batch = {"target": target, "preserved": preserved}
        step(pipeline.transformer, batch, torch.Generator())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("localization", "in_turn"), [(False, False), (True, False), (True, True)])
def test_the_traced_peak_is_what_the_training_step_allocates(checkpointing, localization, in_turn):
    pipeline = tiny_video_pipeline(**WIDE)
    shape = replace(
        SHAPE,
        gradient_checkpointing=checkpointing,
        localization=localization,
        rows_in_turn=in_turn,
    )
    traced = step_memory(config_of(pipeline), shape)
    run = training_step(pipeline, shape)
    run()  # the optimizer makes its state
    measured = peak_bytes(run)
    assert traced.student == pytest.approx(measured, rel=0.15)


def test_sizes_of_weights_are_those_of_the_model():
    pipeline = tiny_video_pipeline()
    frozen = sum(p.nbytes for p in pipeline.transformer.parameters())
    eraser = sum(p.nbytes for p in add_eraser(pipeline.transformer, EraserTraining(rank=8)))
    memory = step_memory(config_of(pipeline), SHAPE)
    assert (memory.transformer, memory.eraser, memory.optimizer) == (frozen, eraser, 2 * eraser)
    half = step_memory(config_of(pipeline), replace(SHAPE, dtype=torch.bfloat16))
    assert (half.transformer, half.eraser) == (frozen // 2, eraser)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_blocks_tell_of_many(checkpointing):
    config = {**config_of(tiny_video_pipeline()), "num_layers": 8, "sample_width": 16}
    shape = replace(SHAPE, latent_shape=(3, 4, 4, 16), gradient_checkpointing=checkpointing)
    assert step_memory(config, shape) == pytest.approx(step_memory(config, shape, exact=True))


def test_autocast_makes_layer_norms_wide_and_checkpointing_saves():
    config = config_of(tiny_video_pipeline(**WIDE))
    plain = replace(SHAPE, dtype=torch.bfloat16, autocast=False, gradient_checkpointing=False)
    with_autocast = step_memory(config, replace(plain, autocast=True)).student
    assert step_memory(config, plain).student < with_autocast
    checkpointed = step_memory(config, replace(plain, gradient_checkpointing=True)).student
    assert checkpointed < 0.7 * step_memory(config, plain).student


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_rows": 0, "preserved_rows": 0}, "must not both be 0"),
        ({"target_rows": -1}, "`target_rows` must be at least 0, got -1"),
        ({"dtype": torch.int8}, "`dtype` must be float32, float16 or bfloat16"),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **change)

from __future__ import annotations

import pytest
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffusers_ext.core.restored_state import module_eval_mode, quiet_run


@pytest.fixture
def pipeline() -> DDIMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, DDIMScheduler())


def test_the_pipelines_own_scheduler_is_not_used(pipeline):
    scheduler = pipeline.scheduler
    timesteps = scheduler.timesteps.clone()
    with quiet_run(pipeline):
        assert pipeline.scheduler is not scheduler
        pipeline(num_inference_steps=2, output_type="np")
    assert pipeline.scheduler is scheduler
    assert scheduler.timesteps.equal(timesteps)
    assert scheduler.num_inference_steps is None


def test_the_progress_bar_is_off_inside(pipeline, capsys):
    with quiet_run(pipeline):
        pipeline(num_inference_steps=2, output_type="np")
    assert capsys.readouterr().err == ""
    pipeline(num_inference_steps=2, output_type="np")
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [None, {"desc": "mine", "leave": False}])
def test_the_users_bar_settings_come_back_after_an_exception(pipeline, settings):
    if settings is not None:
        pipeline.set_progress_bar_config(**settings)
    before = dict(vars(pipeline))
    with pytest.raises(KeyError), quiet_run(pipeline):
        raise KeyError("interrupted")
    assert vars(pipeline) == before
    assert getattr(pipeline, "_progress_bar_config", None) == settings


def test_runs_that_overlap_leave_what_the_first_found(pipeline):
    scheduler, unet = pipeline.scheduler, pipeline.unet.train()
    before = dict(vars(pipeline))
    modes = {name: part.training for name, part in unet.named_modules()}
    first, second = quiet_run(pipeline), quiet_run(pipeline)
    first.__enter__()
    with module_eval_mode(unet.conv_in):
        second.__enter__()
    first.__exit__(None, None, None)
    assert pipeline.scheduler is not scheduler
    assert not any(part.training for part in unet.modules())
    second.__exit__(None, None, None)
    assert vars(pipeline) == before
    assert {name: part.training for name, part in unet.named_modules()} == modes

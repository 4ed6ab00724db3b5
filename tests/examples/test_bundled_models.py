"""The bundled folders load and draw as they are, without a dtype, a device or another argument."""

from __future__ import annotations

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline, StableDiffusionPipeline

from diffusers_ext.core.text_files import read_json
from diffusers_ext.hub.saved_pipelines import with_known_dtype
from examples.arguments import save_in_half_precision
from examples.digits.check_model import MODEL_DIR as PICTURES
from examples.moving_digits.check_model import MODEL_DIR as CLIPS
from tests.tiny_cogvideox import tiny_video_pipeline

EXAMPLES = PICTURES.parents[1]


def dtypes(pipeline: DiffusionPipeline) -> set[torch.dtype]:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {weight.dtype for module in modules for weight in module.parameters()}


def test_the_bundled_model_draws_as_it_loads():
    pipeline = DiffusionPipeline.from_pretrained(PICTURES)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert dtypes(pipeline) == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a photo of the red digit one", num_inference_steps=1, height=32, width=32)


def test_the_bundled_video_model_draws_as_it_loads():
    pipeline = DiffusionPipeline.from_pretrained(CLIPS)
    assert isinstance(pipeline, CogVideoXPipeline)
    assert dtypes(pipeline) == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red three moving right", num_inference_steps=1)


def test_no_config_names_a_folder_of_the_machine_that_made_it():
    configs = [path for path in EXAMPLES.glob("*/model/*/*.json") if "/" in str(read_json(path).get("_name_or_path"))]
    assert not configs


def test_what_is_saved_in_half_precision_loads_in_one_dtype(tmp_path):
    pipeline = tiny_video_pipeline()
    pipeline.vae.register_to_config(_name_or_path="/a/folder")
    save_in_half_precision(pipeline, tmp_path)
    assert not any("/a/folder" in path.read_text() for path in tmp_path.glob("*/config.json"))
    assert dtypes(DiffusionPipeline.from_pretrained(tmp_path)) == {torch.float32}
    asked = DiffusionPipeline.from_pretrained(tmp_path, **with_known_dtype({"dtype": torch.bfloat16}))
    assert dtypes(asked) == {torch.bfloat16}

"""Trainings of erasers of all families that have no file of their own here: from prompts to a file, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline, Flux2KleinPipeline, LTX2Pipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.families import find_family
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_flux2_pipeline, tiny_ltx2_pipeline, tiny_z_image_pipeline
from tests.tiny_hunyuan_video import few_tokens, tiny_hunyuan_video15_pipeline, tiny_hunyuan_video_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline
from tests.training.eraser_runs import read_report, train, write_eraser_files

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Setting(NamedTuple):
    """A tiny pipeline and what its training needs besides."""

    build: Callable[[], DiffusionPipeline]
    flags: dict[str, Any]
    call: dict[str, Any]
    places: str  # of its erasers
    refused: Mapping[str, str] = {}  # variants, and the message


def image_to_video() -> CogVideoXImageToVideoPipeline:
    pipeline = CogVideoXImageToVideoPipeline(**tiny_video_pipeline(in_channels=8).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_flux2() -> Flux2KleinPipeline:
    """Of fewer tokens than the call's default."""
    pipeline = tiny_flux2_pipeline()
    pipeline.tokenizer.model_max_length = 24
    return pipeline


def small_ltx2() -> LTX2Pipeline:
    pipeline = tiny_ltx2_pipeline()
    pipeline.tokenizer.model_max_length = 16
    return pipeline


TRAJECTORIES = {"noise": "`latents_source` must be 'trajectory' for .*, got 'noise'"}
PICTURE = {"height": 32, "width": 32}
VIDEO = {"num_frames": 5, "height": 32, "width": 32}
FAMILIES = {
    "cogvideox image-to-video": Setting(
        image_to_video,
        {"first_frames_dir": "pictures", "localization_weight": 0.1},
        {"image": Image.new("RGB", (16, 16), "blue"), "num_frames": 9, "max_sequence_length": 12},
        "transformer_blocks.1.attn1",
    ),
    "flux2": Setting(small_flux2, PICTURE, PICTURE, "transformer_blocks.0.attn", TRAJECTORIES),
    "z_image": Setting(tiny_z_image_pipeline, PICTURE, PICTURE, "layers.0.attention", TRAJECTORIES),
    "sd3": Setting(tiny_sd3_pipeline, PICTURE, PICTURE, "transformer_blocks.1.attn", TRAJECTORIES),
    "sdxl": Setting(sdxl_pipeline, PICTURE, PICTURE, "attentions.0.transformer_blocks.0.attn2", TRAJECTORIES),
    "hunyuan_video": Setting(tiny_hunyuan_video_pipeline, VIDEO, VIDEO, "transformer_blocks.1.attn"),
    "ltx2": Setting(
        small_ltx2,
        {**VIDEO, "num_frames": 3},
        {**VIDEO, "num_frames": 3, "max_sequence_length": 16},
        "transformer_blocks.0.attn2",
        TRAJECTORIES,
    ),
    "hunyuan_video15": Setting(tiny_hunyuan_video15_pipeline, VIDEO, VIDEO, "transformer_blocks.0.attn"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request):
    with few_tokens():
        yield FAMILIES[request.param]


@pytest.fixture(scope="module")
def files(setting, tmp_path_factory):
    folder = write_eraser_files(tmp_path_factory.mktemp("family"), setting.build())
    (folder / "pictures").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    return folder


def flags_of(setting, files) -> dict[str, Any]:
    flags = {"max_train_steps": 2, "logging_steps": 1, **setting.flags}
    if "first_frames_dir" in flags:
        flags["first_frames_dir"] = files / "pictures"
    return flags


@pytest.fixture(scope="module")
def trained(setting, files, tmp_path_factory):
    validation = {"validation_prompt": "a red seven", "validation_fps": 4}
    return train(files, tmp_path_factory.mktemp("out") / "eraser", **flags_of(setting, files), **validation)


@torch.no_grad()
def test_what_a_run_leaves_erases_in_the_stock_pipeline_and_at_scale_0_nothing(setting, trained):
    report = read_report(trained)
    assert [row["step"] for row in report["history"]] == [1, 2]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["concept"] == "seven"
    tensors = load_file(trained / "adapter_model.safetensors")
    assert any(setting.places in name for name in tensors)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "eraser_up" in name)
    assert (trained / "validation" / "step-000002-prompt-0-video-0.gif").is_file()
    pipeline = setting.build()
    denoiser = getattr(pipeline, find_family(pipeline).denoiser)

    def draw():
        generator = torch.Generator().manual_seed(0)
        call = {"prompt": "a red seven", "num_inference_steps": 2, "generator": generator, **setting.call}
        return pipeline(**call, output_type="latent")[0]

    base = draw()
    name = load_eraser(pipeline, trained)
    erased = draw()
    assert not torch.equal(erased, base)
    denoiser.set_adapters(name, 0.0)
    assert torch.equal(draw(), base)
    denoiser.delete_adapters(name)
    assert torch.equal(draw(), base)


VARIANTS = {
    "noise": {"latents_source": "noise"},
    "on policy": {"on_policy_share": 0.5},
    "half precision": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "kept, linear": {
        "kind": "linear",
        "trajectories_dir": "kept",
        "preserved_concepts_file": None,
        "preservation_weight": 0,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn_finite_weights(variant, setting, files, tmp_path):
    arguments = {**flags_of(setting, files), **VARIANTS[variant]}
    if variant in setting.refused:
        with pytest.raises(ValueError, match=setting.refused[variant]):
            train(files, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
        return
    if "trajectories_dir" in arguments:
        arguments["trajectories_dir"] = tmp_path / "kept"
    folder = train(files, tmp_path / "out", **arguments)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "eraser_up" in name)

from __future__ import annotations

import argparse

import pytest
import torch
from accelerate import Accelerator

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.knowledge import (
    collect,
    decode_in_pipeline_dtype,
    load_or_collect,
    load_pipeline,
    read_knowledge,
)
from diffusers_ext.training.nullspace.run import parse_args
from examples.digits.check_model import load_pipeline as load_digits
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import pixart_pipeline, sdxl_pipeline
from tests.training.conftest import KNOWN

OTHER = "a white ohwx"


@pytest.fixture(scope="module")
def pipeline():
    return load_digits()


@pytest.fixture
def accelerator(fresh_accelerator):
    return Accelerator(cpu=True)


@pytest.fixture
def args(subject_line) -> argparse.Namespace:
    return parse_args(subject_line())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_is_frozen_and_its_vae_exact(args, dtype):
    loaded = load_pipeline(args, torch.device("cpu"), dtype)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    assert loaded.vae.dtype == torch.float32
    for model in (loaded.unet, loaded.text_encoder, loaded.vae):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
    decode_in_pipeline_dtype(loaded)
    assert loaded.vae.dtype == dtype


def test_sdxl_is_a_pipeline_too_and_pixart_is_not(args, tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "xl")
    pixart_pipeline().save_pretrained(tmp_path / "pixart")
    args.pretrained_model_name_or_path = str(tmp_path / "xl")
    loaded = load_pipeline(args, torch.device("cpu"), torch.float32)
    assert not any(parameter.requires_grad for parameter in loaded.text_encoder_2.parameters())
    args.pretrained_model_name_or_path = str(tmp_path / "pixart")
    with pytest.raises(ValueError, match="must be a Stable Diffusion or SDXL .* got PixArtAlpha"):
        load_pipeline(args, torch.device("cpu"), torch.float32)


def test_knowledge_is_the_file_and_the_other_subjects(args):
    assert read_knowledge(args) == list(KNOWN)
    args.other_instance_prompts = [OTHER]
    assert read_knowledge(args) == [*KNOWN, OTHER]
    args.knowledge_prompts = None
    assert read_knowledge(args) == [OTHER]


def test_collected_with_the_settings_of_the_command_line(args, pipeline, accelerator):
    args.features, args.cross_attention_layers = ["q", "k"], [1, 0]
    args.no_sub_phrases, args.negative_prompt, args.guidance_scale = True, "a green one", 2.0
    found = collect(args, pipeline, accelerator, list(KNOWN))
    expected = collect_statistics(
        pipeline, KNOWN, features=("q", "k"), layers=[0, 1], negative_prompt="a green one",
        expand_sub_phrases=False, num_inference_steps=3, guidance_scale=2.0, show_progress=False,
    )  # fmt: skip
    assert found.facts == expected.facts
    for key, moment in expected.moments.items():
        assert torch.equal(found.moments[key].total, moment.total)


def test_nothing_to_preserve(args, pipeline, accelerator):
    args.knowledge_prompts = None
    with pytest.raises(ValueError, match="`--statistics` or `--knowledge_prompts` must be given"):
        load_or_collect(args, pipeline, accelerator)


def test_given_statistics_are_taken_as_they_are(args, pipeline, accelerator, tmp_path):
    known = collect_statistics(pipeline, ["a red one"], show_progress=False)
    known.save_pretrained(tmp_path / "known")
    args.statistics, args.knowledge_prompts = str(tmp_path / "known"), "missing.txt"
    found = load_or_collect(args, pipeline, accelerator)
    assert found.facts == known.facts
    assert torch.equal(found.moments["text"].total, known.moments["text"].total)
    with pytest.raises(ValueError, match="must be of the same text_encoder"):
        load_or_collect(args, random_digits_pipeline(), accelerator)


def test_other_subjects_join_with_the_settings_of_the_statistics(args, pipeline, accelerator, tmp_path):
    run = {
        "features": ("q", "k"), "layers": [0], "negative_prompt": "a green one", "batch_size": 3,
        "expand_sub_phrases": False, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 5,
        "height": 16, "width": 16, "show_progress": False,
    }  # fmt: skip
    known = collect_statistics(pipeline, KNOWN, **run)
    known.save_pretrained(tmp_path / "known")
    args.statistics, args.other_instance_prompts = str(tmp_path / "known"), [OTHER]
    found = load_or_collect(args, pipeline, accelerator)
    other = collect_statistics(pipeline, [OTHER], **run)
    assert found.facts["prompts"] == [*KNOWN, OTHER]
    assert found.facts["settings"] == known.facts["settings"]
    for key, moment in found.moments.items():
        # The other subject weighs as much as the two prompts together.
        expected = known.moments[key].total + 2 * other.moments[key].total
        torch.testing.assert_close(moment.total, expected)
        assert moment.count == known.moments[key].count + 2 * other.moments[key].count
    stored = FeatureStatistics.from_pretrained(tmp_path / "known")
    assert stored.facts["prompts"] == list(KNOWN)


def test_statistics_of_other_layers_or_another_negative_prompt(args, pipeline, accelerator, tmp_path):
    collect_statistics(
        pipeline, KNOWN, layers=[0, 2], negative_prompt="a red one", show_progress=False
    ).save_pretrained(tmp_path / "known")
    args.statistics = str(tmp_path / "known")
    args.cross_attention_layers, args.negative_prompt = [2, 0], "a red one"
    assert len(load_or_collect(args, pipeline, accelerator).linears) == 4
    args.cross_attention_layers = [1]
    with pytest.raises(ValueError, match=r"`cross_attention_layers` must be .*\[0, 2\], got \[1\]"):
        load_or_collect(args, pipeline, accelerator)
    args.cross_attention_layers, args.negative_prompt = "all", "a blue one"
    with pytest.raises(ValueError, match="`negative_prompt` must be .*'a red one', got 'a blue one'"):
        load_or_collect(args, pipeline, accelerator)

"""Pictures of several aspect ratios: their sizes, their turns, and trainings on them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.families import find_family
from diffusers_ext.nullspace.step import DreamBoothLoss, schedule_of
from diffusers_ext.training.nullspace.data import (
    aspect_buckets,
    encode_condition,
    encode_images,
    own_sizes,
    pictures_by_size,
    subject_latents,
)
from diffusers_ext.training.nullspace.run import check_against_model, main, parse_args
from diffusers_ext.training.nullspace.subject import schedules_by_size
from diffusers_ext.training.run.loop import BucketBatchSampler
from tests.tiny_current_pipelines import tiny_auraflow_pipeline, tiny_flux2_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline
from tests.training.test_dreambooth import Echo

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Two tall pictures, a wide and a square one."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, size in {"a": (30, 50), "b": (60, 40), "c": (33, 55), "d": (40, 41)}.items():
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def flux2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux2")
    tiny_flux2_pipeline().to(torch.float16).save_pretrained(folder)
    return folder


def test_sizes_at_1024_are_those_of_sdxl():
    tall = [(1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)]
    assert aspect_buckets(1024, 8) == [*[size[::-1] for size in reversed(tall)], (1024, 1024), *tall]
    assert aspect_buckets(1024, 16) == aspect_buckets(1024, 8)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (1000, 8), (1328, 16), (32, 4), (48, 16)])
def test_sizes_fit_model_ratio_and_area(resolution, multiple):
    sizes = aspect_buckets(resolution, multiple)
    assert len(sizes) == len(set(sizes)) >= 3
    assert (resolution, resolution) in sizes
    assert {size[::-1] for size in sizes} == set(sizes)
    ratios = [height / width for height, width in sizes]
    assert ratios == sorted(ratios)
    assert max(ratios) <= 2
    assert all(side % multiple == 0 for size in sizes for side in size)
    assert all(0.85 * resolution**2 < height * width <= resolution**2 for height, width in sizes)


def test_no_side_is_longer_than_a_model_knows():
    assert max(map(max, aspect_buckets(1024, 16, 1216))) == 1216
    with pytest.raises(ValueError, match="got 1024 with sides in steps of 64 up to 1024. Give another"):
        aspect_buckets(1024, 16, 1024)
    for build, longest in ((tiny_sd3_pipeline, 16), (tiny_auraflow_pipeline, 32), (tiny_flux2_pipeline, None)):
        pipeline = build()
        assert find_family(pipeline).longest_side(pipeline.transformer.config) == longest


def test_every_picture_goes_to_the_nearest_ratio(mixed, tmp_path):
    paths, sizes = sorted(mixed.iterdir()), aspect_buckets(32, 4)
    found = pictures_by_size(paths, sizes)
    names = {size: [path.stem for path in members] for size, members in found.items()}
    assert names == {(24, 40): ["b"], (32, 32): ["d"], (40, 24): ["a", "c"]}
    Image.new("RGB", (300, 20)).save(tmp_path / "panorama.png")
    assert list(pictures_by_size([tmp_path / "panorama.png"], sizes)) == [(24, 40)]


BUCKETS = [0, 1, 0, 2, 1, 0, 0]


def take(count: int, batch_size: int = 3, seed: int = 0, **arguments) -> list[list[int]]:
    return list(islice(BucketBatchSampler(BUCKETS, batch_size, seed, **arguments), count))


def test_batches_hold_one_bucket_and_samples_take_equal_turns():
    batches = take(28)
    assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
    for epoch in range(1, 5):
        seen = Counter(index for batch in batches[: 7 * epoch] for index in batch)
        assert seen == dict.fromkeys(range(7), 3 * epoch)
    order = [BUCKETS[batch[0]] for batch in batches]
    assert len({tuple(order[start : start + 7]) for start in range(0, 28, 7)}) > 1


def test_a_bucketed_batch_depends_on_seed_and_step_alone():
    batches = take(20)
    for start in (1, 6, 7, 15):
        assert take(20 - start, start=start) == batches[start:]
    assert take(20, seed=1) != batches
    parts = [take(20, process_index=index, num_processes=2) for index in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == take(20, 6)


def test_latents_have_the_pictures_own_captions(mixed, tmp_path, subject_line, fresh_accelerator, caplog):
    PartialState()  # which the log asks for
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in mixed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(f"sks {path.stem}")
    pipeline = random_digits_pipeline()
    settings = parse_args(subject_line(instance_data_dir=folder, aspect_buckets=True, random_flip=True))
    with caplog.at_level(logging.INFO):
        dataset, buckets = subject_latents(settings, pipeline)
    assert "Pictures by width and height: 1 of 40 x 24, 1 of 32 x 32, 2 of 24 x 40." in caplog.text
    assert buckets == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [int(sample[2]) for sample in dataset] == [2, 2, 4, 4, 1, 1, 3, 3]  # the instance prompt is the first
    assert [tuple(sample[0].shape[1:]) for sample in dataset][::2] == [(6, 10), (8, 8), (10, 6), (10, 6)]
    alone = encode_images(pipeline, [folder / "b.png"], (24, 40), center_crop=True, flip=False)
    assert torch.equal(dataset[0][0], alone[0][0])


def test_each_batch_has_the_shift_of_its_size(mixed, subject_line):
    pipeline = tiny_flux2_pipeline()
    family = find_family(pipeline)
    settings = parse_args(subject_line(instance_data_dir=mixed, aspect_buckets=True))
    schedules = schedules_by_size(settings, pipeline)
    pixels = family.pixels_per_latent(pipeline)
    assert set(schedules) == {(h // pixels, w // pixels) for h, w in own_sizes(settings, pipeline)}
    tall, square = schedules[40 // pixels, 24 // pixels], schedules[32 // pixels, 32 // pixels]
    assert torch.equal(square.sigmas, schedule_of(pipeline, family, 32, num_inference_steps=3).sigmas)
    tokens = 40 * 24 // pixels**2
    shift = math.exp(family.grid_arguments(pipeline.scheduler.config, 3, tokens)["mu"])
    steps = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(tall.sigmas, shift * steps / (1 + (shift - 1) * steps))
    assert (tall.sigmas - square.sigmas).abs().max() > 1e-5

    condition = encode_condition(pipeline, "a white sks")
    loss = DreamBoothLoss(square, condition, by_size=schedules)
    mean = torch.randn(2, 16, 40 // pixels, 24 // pixels)
    batch = [mean, torch.zeros_like(mean)]
    with torch.no_grad():
        found, as_tall, as_square = (
            one(pipeline.transformer, batch, torch.Generator().manual_seed(0))["loss"]
            for one in (loss, DreamBoothLoss(tall, condition), DreamBoothLoss(square, condition))
        )
    assert found == as_tall != as_square


def test_sdxl_is_told_the_size_of_each_batch():
    pipeline, model = sdxl_pipeline(), Echo()
    loss = DreamBoothLoss(DDPMScheduler(), encode_condition(pipeline, "a"))
    for height, width in ((10, 6), (8, 8)):
        mean = torch.zeros(2, 4, height, width)
        loss(model, [mean, mean], torch.Generator().manual_seed(0))
        height, width = (side * pipeline.vae_scale_factor for side in (height, width))
        assert model.seen[-1]["added"]["time_ids"].tolist() == [[height, width, 0, 0, height, width]] * 2


def test_a_resumed_run_on_several_sizes_is_an_uninterrupted_one(teach, mixed):
    run = {"instance_data_dir": mixed, "aspect_buckets": True, "checkpointing_steps": 2, "random_flip": True}
    whole = teach("whole", **run)
    resumed = teach("resumed", **run, resume_from_checkpoint=whole / "checkpoint-2")
    assert (whole / LORA).read_bytes() == (resumed / LORA).read_bytes()
    square = {**run, "aspect_buckets": None}
    other = load_file(teach("square", **square) / LORA)
    assert any(not torch.equal(other[name], tensor) for name, tensor in load_file(whole / LORA).items())
    with pytest.raises(ValueError, match="`aspect_buckets` must be the same to continue .* it was True, got None"):
        teach("whole", **square, resume_from_checkpoint="latest", max_train_steps=5)


def test_flux2_on_several_sizes_beside_square_pictures_of_the_class(teach, mixed, flux2, tmp_path):
    run = {"instance_data_dir": mixed, "aspect_buckets": True, "checkpointing_steps": 1, "max_train_steps": 2}
    run |= {"pretrained_model_name_or_path": flux2, "mixed_precision": "bf16", "directions": "plain"}
    run |= {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a white three"}
    run |= {"num_inference_steps": 2, "num_class_images": 1}
    whole = teach("whole", **run)
    with Image.open(tmp_path / "class" / "class_00000.png") as drawn:
        assert drawn.size == (32, 32)
    resumed = teach("resumed", **run, resume_from_checkpoint=whole / "checkpoint-1")
    assert (whole / LORA).read_bytes() == (resumed / LORA).read_bytes()
    learnt = [tensor for name, tensor in load_file(whole / LORA).items() if "lora_B" in name]
    assert all(tensor.isfinite().all() for tensor in learnt)
    assert any(tensor.any() for tensor in learnt)


def test_what_has_no_other_sizes_is_refused(subject_line, fresh_accelerator, tmp_path):
    with pytest.raises(
        ValueError, match="`resolution` must have other sizes of its area .* got 8 with sides in steps"
    ):
        main(parse_args(subject_line(aspect_buckets=True, resolution=8)))
    assert not (tmp_path / "out").exists()
    pipeline = random_digits_pipeline()
    pipeline.vae_scale_factor = 16
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 16 for this model, got 40"):
        check_against_model(parse_args(subject_line(aspect_buckets=True, resolution=40)), pipeline)

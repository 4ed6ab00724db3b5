"""Statistics that independent jobs have collected in parts, put together."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.parts import FeatureStatisticsPart, merge_parts, read_shard
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.tiny_current_pipelines import tiny_flux2_pipeline
from tests.tiny_digits import random_digits_pipeline

PROMPTS = ("a red seven", "a blue three", "a green two", "the number nine", "a white one")
RUN = {"num_inference_steps": 2, "guidance_scale": 1.5, "batch_size": 2, "show_progress": False}
KINDS = {
    "unet": (random_digits_pipeline, {"features": ("q", "k", "v"), "layers": [0]}),
    "joint": (tiny_flux2_pipeline, {"scope": "text_stream", "height": 32, "width": 32}),
}


def collect(kind: str = "unet", prompts: tuple[str, ...] = PROMPTS, **arguments) -> FeatureStatistics:
    build, options = KINDS[kind]
    return collect_statistics(build(), prompts, **{**RUN, **options, **arguments})


def write_parts(folder: Path, count: int, kind: str = "unet", **arguments) -> list[Path]:
    folders = [folder / f"{index}" for index in range(count)]
    for index, path in enumerate(folders):
        statistics = collect(kind, shard=(index, count), **arguments)
        FeatureStatisticsPart.of(statistics, (index, count)).save_pretrained(path)
    return folders


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    return write_parts(tmp_path_factory.mktemp("parts"), 3)


@cache
def collected(kind: str) -> FeatureStatistics:
    """By one process."""
    return collect(kind)


@pytest.mark.parametrize(("kind", "count"), [("unet", 3), ("joint", 2), ("unet", 9)])
def test_parts_add_up_to_one_process(tmp_path, parts, kind, count):
    folders = parts if (kind, count) == ("unet", 3) else write_parts(tmp_path, count, kind)
    found = merge_parts(folders[::-1])
    expected = collected(kind)
    assert type(found) is FeatureStatistics
    assert (found.facts, found.sources) == (expected.facts, expected.sources)
    for key, moment in expected.moments.items():
        assert found.moments[key].count == moment.count
        error = (found.moments[key].total - moment.total).abs().max() / moment.total.abs().max()
        assert error < 1e-12, (key, error)
    found.validate()
    found.save_pretrained(tmp_path / "whole")
    assert FeatureStatistics.from_pretrained(tmp_path / "whole").facts == expected.facts


def test_a_part_is_not_taken_for_the_statistics(parts):
    with pytest.raises(ValueError, match="must describe a FeatureStatistics, got one part of it. .*`diffusers-ext me"):
        FeatureStatistics.from_pretrained(parts[0])
    assert FeatureStatisticsPart.from_pretrained(parts[1]).shard == (1, 3)


def test_missing_and_repeated_parts(parts, tmp_path):
    again = shutil.copytree(parts[1], tmp_path / "again")
    whole = tmp_path / "whole"
    merge_parts(parts).save_pretrained(whole)
    fewer = write_parts(tmp_path / "fewer", 1)
    for given, message in (
        ([], "got none"),
        (parts[:2], r"must be all 3 parts, got none for 2/3. Run `diffusers-ext collect --shard 2/3`"),
        ([*parts, again], r"must hold part 1/3 once, got it in .*1 and .*again"),
        ([*parts, parts[0]], "must name every folder once"),
        ([*parts, *fewer], "must be of one number of parts, got 3 and, in .*, 1"),
        ([*parts, whole], "must be folders that `diffusers-ext collect --shard` wrote, got .*whole with"),
        ([*parts, tmp_path], "must be folders that"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_parts(given)


def test_parts_of_other_collections(parts, tmp_path):
    others = {
        "prompts": (
            {"prompts": ("a red seven",)},
            "must be of one collection, got other prompts in .*, 'a blue three' is in one of them",
        ),
        "settings": ({"negative_prompt": "blurry"}, "other settings in .*: negative_prompt is 'blurry', not ''"),
    }
    for name, (arguments, message) in others.items():
        path = tmp_path / name
        statistics = collect(shard=(2, 3), **arguments)
        FeatureStatisticsPart.of(statistics, (2, 3)).save_pretrained(path)
        with pytest.raises(ValueError, match=message):
            merge_parts([*parts[:2], path])
    other = random_digits_pipeline()
    with torch.no_grad():
        for parameter in other.text_encoder.parameters():
            parameter.mul_(1.5)
    statistics = collect_statistics(other, PROMPTS, shard=(2, 3), **RUN, **KINDS["unet"][1])
    FeatureStatisticsPart.of(statistics, (2, 3)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="must be of one model, got another text_encoder in .*model"):
        merge_parts([*parts[:2], tmp_path / "model"])


def test_an_altered_part_is_refused(parts, tmp_path):
    copied = shutil.copytree(parts[2], tmp_path / "part")
    config = json.loads((copied / CONFIG_NAME).read_text())
    for shard in ([3, 3], [0], ["0", 3], None):
        config["facts"]["part"] = shard
        (copied / CONFIG_NAME).write_text(json.dumps(config))
        with pytest.raises(ValueError, match="`facts.part` must be an index below a count"):
            merge_parts([*parts[:2], copied])
    config["facts"]["part"] = [2, 3]
    config["moments"]["text"]["count"] += 1
    (copied / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="altered"):
        merge_parts([*parts[:2], copied])


def test_shards_are_read_by_their_words():
    assert read_shard("0/4") == (0, 4)
    assert read_shard(" 3/4 ") == (3, 4)
    for text in ("4/4", "-1/4", "1", "1/0", "a/b", "1/4/2", ""):
        with pytest.raises(ValueError, match="`shard` must be an index and a count as in 0/4"):
            read_shard(text)

"""A subject is taught from a folder of pictures, on SDXL too."""

from __future__ import annotations

import pytest
from PIL import Image

from diffusers_ext import FeatureStatistics, check_loaded_lora
from examples.teach_a_subject import main
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline


@pytest.mark.parametrize("make", [random_digits_pipeline, sdxl_pipeline])
def test_the_lora_loads_in_the_plain_pipeline_and_the_sheet_shows_what_it_did(tmp_path, make):
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (40, 50), (90 * index, 200, 30)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "knowledge.txt").write_text("a red seven\na blue one\n")
    main(
        ["--model", str(tmp_path / "model"), "--instance_data_dir", str(tmp_path / "photos"),
         "--knowledge_prompts", str(tmp_path / "knowledge.txt"), "--instance_prompt", "a sks",
         "--max_train_steps", "2", "--num_inference_steps", "2", "--learning_rate", "1.0",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path / "out")
    assert check_loaded_lora(pipeline) >= 8
    statistics = FeatureStatistics.from_pretrained(tmp_path / "out" / "statistics")
    assert statistics.facts["prompts"] == ["a red seven", "a blue one"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 4 * 96
        assert sheet.height > 3 * 96
